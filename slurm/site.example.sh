# shellcheck shell=bash disable=SC2034
# The settings of a site: modules, network, options of srun, a container. Each job of far_scale first reads the copy of
# this file on its first node, at each start. Copy it once, and edit the copy, which git ignores:
#
#     cp slurm/site.example.sh slurm/site.sh
#
# It is bash. A line that fails ends the job, with the number of the line; so does `exit`. docs/cluster.md explains the
# settings.

# --- Modules and environment ------------------------------------------------------------------------------------------
# Without a container: put a Python with DeepSpeed first on PATH, or set PYTHON to it. Otherwise the jobs use the .venv of
# the checkout.

# module load gcc/13 cuda/12.8
# source /shared/envs/far_scale/bin/activate

# --- Network ----------------------------------------------------------------------------------------------------------
# The interfaces that all nodes share (`ip -brief address` on a node lists them). By default gloo uses the address that
# the host's name resolves to, and NCCL the first InfiniBand interface.

# export GLOO_SOCKET_IFNAME=ib0
# export NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5_0,mlx5_1

# --- srun -------------------------------------------------------------------------------------------------------------
# Further options for the steps of a job. Options of sbatch (--account, --qos) belong on its command line, or into
# SBATCH_ACCOUNT, SBATCH_QOS and the like in your shell.

# SITE_SRUN_OPTIONS=(--mpi=none --cpu-bind=cores)

# --- Container --------------------------------------------------------------------------------------------------------
# If far_scale's packages are in an image (slurm/container/ builds one), set one of these two. The checkout, the data and
# the working folder must have the same paths inside. The nodes themselves then need python3 (3.9 or newer, no packages);
# HOST_PYTHON names another. PYTHON is the Python inside.

# A command, such as apptainer. It must pass on signals and the environment:
# SITE_CONTAINER=(apptainer exec --nv --bind /shared,/scratch /shared/images/far_scale.sif)

# Or options with which srun itself starts the container, as with pyxis and enroot:
# SITE_CONTAINER_OPTIONS=(--container-image=/shared/images/far_scale.sqsh --container-mounts=/shared,/scratch
#     "--container-workdir=$PWD")

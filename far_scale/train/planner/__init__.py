"""What a run takes before it starts: shapes, memory, time, traffic and disk, for ranks that need not exist.

shapes        the packs of a stage, from its shard set or from the recipe alone
memory        bytes of a rank in parts
work          arithmetic and traffic of a step, the inputs of the time model
time_model    seconds of a step from its work, fitted to measured steps
profile       the measured steps of one machine, a dated file; measure writes it
estimate      all of this for a recipe; limits names what limits a stage, changes what would make it fit
checkpoints   how often to save
report        the plan as text
"""

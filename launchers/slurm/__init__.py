"""A batch job of Slurm, through its own commands: sbatch, scontrol, squeue, scancel; sacct where there is accounting.

    script.py       the batch script, rendered from a job's spec (pure)
    commands.py     asks Slurm, and reads what it says
    submission.py   hands a script over, and finds a job that Slurm took without a word
    launcher.py     the launcher, also for the jobs of a sweep as one array

Not covered: Slurm's REST interface, heterogeneous jobs, federations.
"""

from launchers.slurm.launcher import SlurmLauncher

__all__ = ["SlurmLauncher"]

"""A batch job of Slurm, through its own commands: sbatch, scontrol, scancel, and sacct where there is accounting.

    script.py     the batch script, rendered from a job's spec (pure)
    commands.py   asks Slurm, and reads what it says
    launcher.py   the launcher, also for the jobs of a sweep as one array

Not covered: Slurm's REST interface, heterogeneous jobs, federations.
"""

from launchers.slurm.launcher import SlurmLauncher

__all__ = ["SlurmLauncher"]

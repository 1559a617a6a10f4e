"""Cleaning and deduplication of corpora beyond one machine, on datatrove's executors.

    mark    finds where files that are larger than a task's share can be cut            (only if there are such)
    read    reads, makes records, cleans them; writes rows, and what the survey needs   `tasks` tasks
    gather  puts together what the survey learned                                       one task, if needed
    meet    finds the records that agree in a band of their signatures                  `tasks` tasks, if near
    decide  draws splits, decides which duplicates go                                   one task, if needed

After that the ordinary engine takes the rows from the work folder, in the order in which they would have come from the
sources, so that the prepared data is the same to the byte. datatrove brings the executors: placing tasks, retrying
them, knowing which are done. It is imported only where it is used, and asks no network.
"""

from data_prep.corpus.executors import Executor, Here, Local, Ray, Slurm

__all__ = ["Executor", "Here", "Local", "Ray", "Slurm"]

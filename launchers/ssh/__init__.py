"""launcher=ssh: this command holds a connection to an agent (`launchers.agent`) on each machine.

`launcher` is the seam; `hosts` says which machines; `connection` is ssh to one of them, and `beats` are the signs of
life; `gather` connects to all and has each look whether it can take part, with `probe` for the job's Python; `session`
replaces or awaits those that are away, and says what each is told; `attempt` runs one attempt on them to its end;
`launchers.terminal` shows what they print.
"""

"""What `crosstune prove` needs of training: figures and tensors compared, a checkpoint loaded and saved again."""

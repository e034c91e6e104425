"""The machine, without the model: measuring, isolation, memory of the allocator, progress, files."""

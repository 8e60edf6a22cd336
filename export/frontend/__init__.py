"""What a user brings: files, classes, scripts and modules, each made one `Subject`."""

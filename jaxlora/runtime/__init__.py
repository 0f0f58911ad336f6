"""The machine around the program: errors, hosts, signals, files, progress, devices."""

"""containerd's role: content, images, snapshots, leases, containers, tasks, events."""

"""What every floor needs and no container is mentioned in: errors, descriptors, atomic files, failpoints."""

"""Numbers and struct layouts of the Linux ABI: data only; imports nothing."""

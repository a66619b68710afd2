"""boxrun: runc's command line over `boxship.runtime`. `main` is the entry; `table` has the commands and their flags."""

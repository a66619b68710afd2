"""The user-space part of published ports, and the home of the names of containers: one process for all containers.

Runs in: `control` and `client` in the daemon, all else in the helper, `python -I -m boxship.network.proxy`.
Spec: what dockerd's docker-proxy does, one process of which there is for each port and family.

    daemon ── client.Proxy ──┐                               ┌── _relay  threads of C (src/native/relay.c) for the ports
    daemon ── dns.client ────┴── SOCK_SEQPACKET ── helper ───┤
                                 STATE/network/socket        └── dns     a resolver in each container's namespace

The helper outlives the daemon: connections stay open, names are answered, and the next daemon finds it by its socket and says
what there is to be. It ends when it has nothing to do and no daemon is there.
"""

"""The name server of containers on networks that users made, 127.0.0.11 in each of them.

Runs in: `client` in the daemon, all else in the helper (`boxship.network.proxy`), so that names outlive the daemon too.
Spec: RFC 1035, RFC 6891 (EDNS), RFC 7766 (TCP); what libnetwork answers.

    message   queries taken apart, answers put together   (pure)
    names     who is called what on which network         (pure)
    resolvers the sockets in the containers' namespaces
    forward   questions that are for the servers outside
"""

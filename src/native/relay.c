/* boxship.network.proxy._relay: the streams and datagrams of published ports.
 *
 *   start(workers)                           threads that never touch the interpreter
 *   listen(fd, host, port, protocol, idle_s) -> id   what comes to fd (now ours) goes to host:port; protocol as for socket(2)
 *   withdraw(id)                             the port is free and its connections are closed when this returns
 *   connections(id) -> int                   how many there are
 *
 * Each worker has an epoll(7) of its own, edge-triggered, and every listener in it (EPOLLEXCLUSIVE); who accepts a connection
 * keeps it. Short messages go through one buffer per worker. What fills that buffer is a bulk transfer and is spliced through a
 * pipe from then on, without a copy. A connection that says nothing costs two descriptors and one struct conn.
 * A side is read only while the other one takes data: back-pressure is the kernel's own.
 *
 * Datagrams: a listener belongs to one worker; each client has a socket of its own to the container, a `flow`, so that answers
 * find back to it, from the address that it had asked (IP_PKTINFO, where the caller has switched that on). A flow ends after
 * idle_s without a datagram, and the one that has been silent for longest makes place when there are FLOWS_MAX.
 *
 * Lock: `lock` protects `listeners` and their `left`; a worker's connections, pipes and lists are touched by that worker alone.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { BUFFER = 64 << 10, PIPE = 512 << 10, TURN = 2 << 20, WORKERS_MAX = 16, EVENTS = 64, ACCEPTS = 16, PIPES_KEPT = 16, STACK = 64 << 10,
       FLOWS_MAX = 4096, BUCKETS = 1024, BATCH = 16, BATCHES = 4, DATAGRAM = 64 << 10, SWEEP_MS = 1000 };

/* What an event is about, in the low bits of its pointer. */
enum { SIDE, STREAM_LISTENER, DATAGRAM_LISTENER, FLOW };

struct flow;

struct listener {
	struct listener *next;
	long id;
	int fd, protocol;
	struct sockaddr_storage target;
	socklen_t target_size;
	atomic_int open;
	bool leaving;
	unsigned left;  /* bit per worker that has let go of it */
	/* datagrams, the owning worker's alone */
	struct worker *owner;
	struct flow **buckets, *newest, *oldest;
	int idle_s;
};

union address {
	struct sockaddr any;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

struct flow {
	struct listener *listener;
	struct flow *next;             /* in its bucket; once closed, among those to be freed */
	struct flow *newer, *older;
	int fd;
	bool closed;
	time_t used;
	union address client;
	socklen_t client_size;
	size_t control_size;           /* 0 when the kernel is to choose where answers come from */
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(struct in6_pktinfo))];
	} control;
};

struct datagrams {
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	union address names[BATCH];
	union {
		struct cmsghdr header;
		char bytes[CMSG_SPACE(sizeof(struct in6_pktinfo)) + CMSG_SPACE(sizeof(int))];
	} controls[BATCH];
	char data[BATCH][DATAGRAM];
};

struct conn;

struct side {
	struct conn *conn;
	int fd;
	bool readable, writable;  /* as far as epoll has told and no call has denied since */
	bool ending;              /* epoll has told of an end: read until it is seen */
	bool eof;                 /* nothing more comes from it */
	bool shut;                /* it has been told that nothing more comes from the other one */
	bool bulk;
	char *rest;               /* read from here and not yet taken by the other side */
	size_t at, length;
	int pipe[2];              /* the same in a pipe; -1 when there is none */
	size_t piped;
};

struct conn {
	struct side client, server;
	struct listener *listener;
	struct conn *previous, *next;  /* the worker's, or next alone: those to be freed */
	struct conn *next_again;
	bool connected, closed, again;
};

struct worker {
	unsigned bit;
	int epoll, wake, reserve;
	struct conn *conns, *dead, *again;
	int pipes[PIPES_KEPT][2];
	int pipe_count;
	unsigned flows;
	struct flow *dead_flows;
	time_t now;
	struct datagrams *datagrams;   /* mapped with the first one: pages that no datagram needed cost nothing */
	char buffer[BUFFER];
};

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t let_go = PTHREAD_COND_INITIALIZER;
static struct listener *listeners;
static struct worker *workers[WORKERS_MAX];
static unsigned worker_count;
static long next_id = 1;

static void take_pipe(struct worker *w, struct side *side)
{
	if (w->pipe_count) {
		memcpy(side->pipe, w->pipes[--w->pipe_count], sizeof side->pipe);
	} else if (pipe2(side->pipe, O_CLOEXEC | O_NONBLOCK) == 0) {
		(void)fcntl(side->pipe[1], F_SETPIPE_SZ, PIPE);  /* may be refused: then it is as large as it is */
	} else {
		side->pipe[0] = side->pipe[1] = -1;
	}
}

/* A pipe that holds something is of no use to anybody else. */
static void give_pipe(struct worker *w, struct side *side)
{
	if (side->pipe[0] < 0)
		return;
	if (!side->piped && w->pipe_count < PIPES_KEPT) {
		memcpy(w->pipes[w->pipe_count++], side->pipe, sizeof side->pipe);
	} else {
		close(side->pipe[0]);
		close(side->pipe[1]);
	}
	side->pipe[0] = side->pipe[1] = -1;
}

static void release(struct worker *w, struct side *side)
{
	give_pipe(w, side);
	free(side->rest);
	side->rest = NULL;
	close(side->fd);
}

/* Freed at the end of the turn: later events of this turn may still mean it. */
static void close_conn(struct worker *w, struct conn *c, bool reset)
{
	if (c->closed)
		return;
	c->closed = true;
	if (reset) {
		struct linger hard = {1, 0};
		setsockopt(c->client.fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
		setsockopt(c->server.fd, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
	}
	release(w, &c->client);
	release(w, &c->server);
	if (c->previous)
		c->previous->next = c->next;
	else
		w->conns = c->next;
	if (c->next)
		c->next->previous = c->previous;
	atomic_fetch_sub(&c->listener->open, 1);
	c->next = w->dead;
	w->dead = c;
}

enum moved { IDLE, AGAIN, BROKEN };

/* What `to` has not taken so far. IDLE: it is all gone; AGAIN: `to` takes no more for now. */
static enum moved flush(struct side *from, struct side *to)
{
	while (from->at < from->length || from->piped) {
		ssize_t n;
		if (!to->writable)
			return AGAIN;
		if (from->at < from->length)
			n = send(to->fd, from->rest + from->at, from->length - from->at, MSG_NOSIGNAL | MSG_DONTWAIT);
		else
			n = splice(from->pipe[0], NULL, to->fd, NULL, from->piped, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == EAGAIN) {
			to->writable = false;
			return AGAIN;
		}
		if (n <= 0)
			return BROKEN;
		if (from->at < from->length)
			from->at += (size_t)n;
		else
			from->piped -= (size_t)n;
	}
	if (from->rest) {
		free(from->rest);
		from->rest = NULL;
		from->at = from->length = 0;
	}
	return IDLE;
}

/* Read once, and give on what can be given at once. The size that was read, 0 at the end, -1 with errno. */
static ssize_t carry(struct worker *w, struct side *from, struct side *to)
{
	if (from->bulk && from->pipe[0] < 0)
		take_pipe(w, from);
	if (from->bulk && from->pipe[0] >= 0) {
		ssize_t n = splice(from->fd, NULL, from->pipe[1], NULL, PIPE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
		if (n > 0)
			from->piped = (size_t)n;
		return n;
	}
	ssize_t n = recv(from->fd, w->buffer, BUFFER, MSG_DONTWAIT);
	if (n <= 0)
		return n;
	ssize_t sent = send(to->fd, w->buffer, (size_t)n, MSG_NOSIGNAL | MSG_DONTWAIT);
	if (sent < 0 && errno != EAGAIN && errno != EINTR) {
		errno = EPIPE;
		return -1;
	}
	if (sent < 0)
		sent = 0;
	if (sent < n) {
		from->length = (size_t)(n - sent);
		from->at = 0;
		from->rest = malloc(from->length);
		if (!from->rest) {
			errno = ENOMEM;
			return -1;
		}
		memcpy(from->rest, w->buffer + sent, from->length);
	}
	if (n == BUFFER)
		from->bulk = from->conn->listener->protocol == IPPROTO_TCP;
	else if (!from->ending)
		from->readable = false;  /* a short read has emptied it; more will be told of */
	return n;
}

/* Everything that can go from one side to the other now. AGAIN: there is more, but others have their turn first. */
static enum moved move(struct worker *w, struct side *from, struct side *to)
{
	size_t moved = 0;
	for (;;) {
		enum moved left = flush(from, to);
		if (left != IDLE)
			return left == AGAIN ? IDLE : BROKEN;
		if (from->eof) {
			give_pipe(w, from);
			if (!to->shut) {
				to->shut = true;
				if (!to->eof || to->piped || to->rest)
					shutdown(to->fd, SHUT_WR);
			}
			return IDLE;
		}
		if (!from->readable || !to->writable) {
			give_pipe(w, from);
			return IDLE;
		}
		if (moved >= TURN)
			return AGAIN;
		ssize_t n = carry(w, from, to);
		if (n > 0) {
			moved += (size_t)n;
		} else if (n == 0) {
			from->eof = true;
		} else if (errno == EAGAIN) {
			from->readable = false;
			from->bulk = false;
		} else if (errno != EINTR) {
			return BROKEN;
		}
	}
}

static void pump(struct worker *w, struct conn *c)
{
	if (c->closed || !c->connected)
		return;
	enum moved up = move(w, &c->client, &c->server);
	enum moved down = up == BROKEN ? BROKEN : move(w, &c->server, &c->client);
	if (up == BROKEN || down == BROKEN) {
		close_conn(w, c, true);
	} else if (c->client.shut && c->server.shut) {
		close_conn(w, c, false);
	} else if ((up == AGAIN || down == AGAIN) && !c->again) {
		c->again = true;
		c->next_again = w->again;
		w->again = c;
	}
}

static void on_side(struct worker *w, struct side *side, uint32_t events)
{
	struct conn *c = side->conn;
	if (c->closed)
		return;
	if (!c->connected && side == &c->server && events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) {
		int error = 0;
		socklen_t size = sizeof error;
		getsockopt(side->fd, SOL_SOCKET, SO_ERROR, &error, &size);
		if (error || !(events & EPOLLOUT)) {
			close_conn(w, c, false);
			return;
		}
		c->connected = true;
	} else if (events & EPOLLERR) {
		close_conn(w, c, true);
		return;
	}
	if (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP))
		side->readable = true;
	if (events & (EPOLLRDHUP | EPOLLHUP))
		side->ending = true;
	if (events & EPOLLOUT)
		side->writable = true;
	pump(w, c);
}

static bool watch(struct worker *w, struct side *side)
{
	struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, .data.ptr = side};
	return epoll_ctl(w->epoll, EPOLL_CTL_ADD, side->fd, &event) == 0;
}

static void adopt(struct worker *w, struct listener *l, int fd)
{
	int server = socket(l->target.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, l->protocol);
	struct conn *c = server < 0 ? NULL : calloc(1, sizeof *c);
	if (!c)
		goto refuse;
	int on = 1;
	if (l->protocol == IPPROTO_TCP)
		setsockopt(server, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
	if (connect(server, (struct sockaddr *)&l->target, l->target_size) < 0 && errno != EINPROGRESS)
		goto refuse;
	c->listener = l;
	c->client = (struct side){.conn = c, .fd = fd, .pipe = {-1, -1}};
	c->server = (struct side){.conn = c, .fd = server, .pipe = {-1, -1}};
	c->next = w->conns;
	if (c->next)
		c->next->previous = c;
	w->conns = c;
	atomic_fetch_add(&l->open, 1);
	if (!watch(w, &c->server) || !watch(w, &c->client))
		close_conn(w, c, false);
	return;
refuse:
	free(c);
	if (server >= 0)
		close(server);
	close(fd);
}

static void on_listener(struct worker *w, struct listener *l)
{
	for (int i = 0; i < ACCEPTS; i++) {
		int fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
		if (fd >= 0) {
			adopt(w, l, fd);
		} else if ((errno == EMFILE || errno == ENFILE) && w->reserve >= 0) {
			/* Whom we have no descriptor for is turned away, so that the queue does not wake us for ever. */
			close(w->reserve);
			fd = accept4(l->fd, NULL, NULL, SOCK_CLOEXEC);
			if (fd >= 0)
				close(fd);
			w->reserve = open("/dev/null", O_RDONLY | O_CLOEXEC);
		} else if (errno != ECONNABORTED && errno != EINTR) {
			return;
		}
	}
}

static struct flow **bucket_of(struct listener *l, const union address *client)
{
	uint32_t hash = 2166136261u;
	const unsigned char *bytes = (const unsigned char *)client;
	size_t size = client->any.sa_family == AF_INET ? offsetof(struct sockaddr_in, sin_zero) : sizeof client->v6;
	for (size_t i = 0; i < size; i++)
		hash = (hash ^ bytes[i]) * 16777619u;
	return &l->buckets[hash % BUCKETS];
}

static void unlink_age(struct flow *f)
{
	*(f->newer ? &f->newer->older : &f->listener->newest) = f->older;
	*(f->older ? &f->older->newer : &f->listener->oldest) = f->newer;
}

static void touch(struct worker *w, struct flow *f, bool made)
{
	struct listener *l = f->listener;
	f->used = w->now;
	if (l->newest == f)
		return;
	if (!made)
		unlink_age(f);
	f->newer = NULL;
	f->older = l->newest;
	*(l->newest ? &l->newest->newer : &l->oldest) = f;
	l->newest = f;
}

/* Freed at the end of the turn, as connections are. */
static void close_flow(struct worker *w, struct flow *f)
{
	struct flow **place = bucket_of(f->listener, &f->client);
	while (*place != f)
		place = &(*place)->next;
	*place = f->next;
	unlink_age(f);
	close(f->fd);
	f->closed = true;
	w->flows--;
	atomic_fetch_sub(&f->listener->open, 1);
	f->next = w->dead_flows;
	w->dead_flows = f;
}

/* What arrived at one of our addresses, turned into what is to leave from it. */
static void keep_source(struct flow *f, struct msghdr *from)
{
	struct cmsghdr *found = CMSG_FIRSTHDR(from), *kept = &f->control.header;
	f->control_size = 0;
	for (; found; found = CMSG_NXTHDR(from, found)) {
		if (found->cmsg_level == IPPROTO_IP && found->cmsg_type == IP_PKTINFO) {
			struct in_pktinfo info;
			memcpy(&info, CMSG_DATA(found), sizeof info);
			info.ipi_ifindex = 0;
			info.ipi_addr.s_addr = 0;
			*kept = *found;
			memcpy(CMSG_DATA(kept), &info, sizeof info);
			f->control_size = CMSG_SPACE(sizeof info);
		} else if (found->cmsg_level == IPPROTO_IPV6 && found->cmsg_type == IPV6_PKTINFO) {
			struct in6_pktinfo info;
			memcpy(&info, CMSG_DATA(found), sizeof info);
			if (IN6_IS_ADDR_MULTICAST(&info.ipi6_addr))
				continue;
			/* Link-local addresses mean something with their interface alone. */
			if (!IN6_IS_ADDR_LINKLOCAL(&info.ipi6_addr))
				info.ipi6_ifindex = 0;
			*kept = *found;
			memcpy(CMSG_DATA(kept), &info, sizeof info);
			f->control_size = CMSG_SPACE(sizeof info);
		}
	}
}

static bool same_source(struct flow *f, struct flow *other)
{
	return f->control_size == other->control_size && !memcmp(&f->control, &other->control, f->control_size);
}

static struct flow *flow_of(struct worker *w, struct listener *l, struct msghdr *from)
{
	const union address *client = from->msg_name;
	struct flow asked = {.control_size = 0}, *f, **bucket = bucket_of(l, client);
	keep_source(&asked, from);
	for (f = *bucket; f; f = f->next) {
		if (f->client_size == from->msg_namelen && !memcmp(&f->client, client, f->client_size) && same_source(f, &asked)) {
			touch(w, f, false);
			return f;
		}
	}
	if (atomic_load(&l->open) >= FLOWS_MAX)
		close_flow(w, l->oldest);
	int fd = socket(l->target.ss_family, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	f = fd < 0 ? NULL : calloc(1, sizeof *f);
	if (!f)
		goto refuse;
	*f = asked;
	f->listener = l;
	f->fd = fd;
	f->client_size = from->msg_namelen;
	memcpy(&f->client, client, f->client_size);
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = (void *)((uintptr_t)f | FLOW)};
	if (connect(fd, (struct sockaddr *)&l->target, l->target_size) < 0 || epoll_ctl(w->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
		goto refuse;
	f->next = *bucket;
	*bucket = f;
	touch(w, f, true);
	w->flows++;
	atomic_fetch_add(&l->open, 1);
	return f;
refuse:
	free(f);
	if (fd >= 0)
		close(fd);
	return NULL;
}

/* Datagrams that cannot be sent are lost, as they may be anywhere. */
static void send_all(int fd, struct mmsghdr *messages, int count)
{
	bool again = false;
	while (count > 0) {
		int sent = sendmmsg(fd, messages, (unsigned)count, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == ECONNREFUSED && !again) {
			again = true;  /* said of one before; this one has not been sent */
			continue;
		}
		again = false;
		sent = sent < 1 ? 1 : sent;
		messages += sent;
		count -= sent;
	}
}

static int receive(struct worker *w, int fd)
{
	struct datagrams *d = w->datagrams;
	for (int i = 0; i < BATCH; i++) {
		d->parts[i] = (struct iovec){d->data[i], DATAGRAM};
		d->messages[i].msg_hdr = (struct msghdr){
			.msg_name = &d->names[i], .msg_namelen = sizeof d->names[i], .msg_iov = &d->parts[i], .msg_iovlen = 1,
			.msg_control = &d->controls[i], .msg_controllen = sizeof d->controls[i],
		};
	}
	int count = recvmmsg(fd, d->messages, BATCH, MSG_DONTWAIT, NULL);
	for (int i = 0; i < count; i++)
		d->parts[i].iov_len = d->messages[i].msg_len;
	return count;
}

static void on_datagrams(struct worker *w, struct listener *l)
{
	struct datagrams *d = w->datagrams;
	for (int turn = 0, count = BATCH; turn < BATCHES && count == BATCH; turn++) {
		count = receive(w, l->fd);
		struct flow *before = NULL;
		int first = 0;
		for (int i = 0; i < count; i++) {
			struct msghdr *message = &d->messages[i].msg_hdr;
			struct flow *f = flow_of(w, l, message);
			message->msg_name = message->msg_control = NULL;
			message->msg_namelen = 0;
			message->msg_controllen = 0;
			/* Neighbours of one client go out together; of a flow that was just closed for another's sake, nothing does. */
			if (f != before || !f) {
				if (before && !before->closed)
					send_all(before->fd, d->messages + first, i - first);
				first = i;
				before = f;
			}
		}
		if (before)
			send_all(before->fd, d->messages + first, count - first);
	}
}

static void on_flow(struct worker *w, struct flow *f)
{
	struct datagrams *d = w->datagrams;
	for (int turn = 0, count = BATCH; turn < BATCHES && count == BATCH && !f->closed; turn++) {
		count = receive(w, f->fd);
		for (int i = 0; i < count; i++) {
			struct msghdr *message = &d->messages[i].msg_hdr;
			message->msg_name = &f->client;
			message->msg_namelen = f->client_size;
			message->msg_control = f->control_size ? &f->control : NULL;
			message->msg_controllen = f->control_size;
		}
		if (count > 0) {
			touch(w, f, false);
			send_all(f->listener->fd, d->messages, count);
		}
	}
}

static void sweep(struct worker *w)
{
	pthread_mutex_lock(&lock);
	for (struct listener *l = listeners; l; l = l->next)
		while (l->buckets && l->owner == w && l->oldest && w->now - l->oldest->used > l->idle_s)
			close_flow(w, l->oldest);
	pthread_mutex_unlock(&lock);
}

/* Let go of the listeners that are being withdrawn. */
static void leave(struct worker *w)
{
	pthread_mutex_lock(&lock);
	for (struct listener *l = listeners; l; l = l->next) {
		if (!l->leaving || l->left & w->bit)
			continue;
		epoll_ctl(w->epoll, EPOLL_CTL_DEL, l->fd, NULL);
		for (struct conn *c = w->conns, *next; c; c = next) {
			next = c->next;
			if (c->listener == l)
				close_conn(w, c, true);
		}
		while (l->buckets && l->owner == w && l->oldest)
			close_flow(w, l->oldest);
		l->left |= w->bit;
	}
	pthread_cond_broadcast(&let_go);
	pthread_mutex_unlock(&lock);
}

static void *work(void *argument)
{
	struct worker *w = argument;
	struct epoll_event events[EVENTS];
	time_t swept = 0;
	for (;;) {
		bool leaving = false;
		int count = epoll_wait(w->epoll, events, EVENTS, w->again ? 0 : w->flows ? SWEEP_MS : -1);
		struct timespec now;
		clock_gettime(CLOCK_MONOTONIC_COARSE, &now);
		w->now = now.tv_sec;
		for (int i = 0; i < count; i++) {
			uintptr_t tag = (uintptr_t)events[i].data.ptr;
			void *object = (void *)(tag & ~(uintptr_t)3);
			if (!tag) {
				uint64_t value;
				leaving = read(w->wake, &value, sizeof value) > 0 || leaving;
			} else if ((tag & 3) == STREAM_LISTENER) {
				on_listener(w, object);
			} else if ((tag & 3) == DATAGRAM_LISTENER) {
				on_datagrams(w, object);
			} else if ((tag & 3) == FLOW) {
				on_flow(w, object);
			} else {
				on_side(w, object, events[i].events);
			}
		}
		if (w->flows && w->now != swept) {
			swept = w->now;
			sweep(w);
		}
		struct conn *c = w->again;
		w->again = NULL;
		while (c) {
			struct conn *next = c->next_again;
			c->again = false;
			pump(w, c);
			c = next;
		}
		/* Last, so that no event of this turn means a listener that is gone. */
		if (leaving)
			leave(w);
		/* One that was to go on is still in the list of those, and freed after its turn. */
		for (struct conn **place = &w->dead; (c = *place);) {
			if (c->again) {
				place = &c->next;
			} else {
				*place = c->next;
				free(c);
			}
		}
		for (struct flow *f; (f = w->dead_flows);) {
			w->dead_flows = f->next;
			free(f);
		}
	}
	return NULL;
}

static PyObject *os_error(int number)
{
	errno = number;
	return PyErr_SetFromErrno(PyExc_OSError);
}

static int start_one(void)
{
	struct worker *w = calloc(1, sizeof *w);
	if (!w)
		return ENOMEM;
	w->bit = 1u << worker_count;
	w->epoll = epoll_create1(EPOLL_CLOEXEC);
	w->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	w->reserve = open("/dev/null", O_RDONLY | O_CLOEXEC);
	struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
	int failed = 0;
	pthread_attr_t attributes;
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK);
	pthread_t thread;
	if (w->epoll < 0 || w->wake < 0 || epoll_ctl(w->epoll, EPOLL_CTL_ADD, w->wake, &event) < 0)
		failed = errno;
	else
		failed = pthread_create(&thread, &attributes, work, w);
	pthread_attr_destroy(&attributes);
	if (failed)
		return failed;
	pthread_detach(thread);
	workers[worker_count++] = w;
	return 0;
}

static PyObject *relay_start(PyObject *self, PyObject *args)
{
	(void)self;
	unsigned count;
	if (!PyArg_ParseTuple(args, "I:start", &count))
		return NULL;
	/* Signals are the interpreter's. */
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	int failed = 0;
	while (!failed && worker_count < count && worker_count < WORKERS_MAX)
		failed = start_one();
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (failed && !worker_count)
		return os_error(failed);
	Py_RETURN_NONE;
}

static int set_target(struct listener *l, const char *host, int port)
{
	struct sockaddr_in *v4 = (struct sockaddr_in *)&l->target;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&l->target;
	if (inet_pton(AF_INET, host, &v4->sin_addr) == 1) {
		v4->sin_family = AF_INET;
		v4->sin_port = htons((uint16_t)port);
		l->target_size = sizeof *v4;
		return 0;
	}
	if (inet_pton(AF_INET6, host, &v6->sin6_addr) == 1) {
		v6->sin6_family = AF_INET6;
		v6->sin6_port = htons((uint16_t)port);
		l->target_size = sizeof *v6;
		return 0;
	}
	return -1;
}

static struct listener *find(long id)
{
	struct listener *l = listeners;
	while (l && l->id != id)
		l = l->next;
	return l;
}

/* No worker may know it any more, or ever have. */
static void forget(struct listener *gone)
{
	struct listener **place = &listeners;
	while (*place != gone)
		place = &(*place)->next;
	*place = gone->next;
	close(gone->fd);
	free(gone->buckets);
	free(gone);
}

static void withdraw(struct listener *l)
{
	uint64_t one = 1;
	unsigned all = (1u << worker_count) - 1;
	l->leaving = true;
	for (unsigned i = 0; i < worker_count; i++)
		(void)!write(workers[i]->wake, &one, sizeof one);
	while (l->left != all)
		pthread_cond_wait(&let_go, &lock);
	forget(l);
}

/* One worker's, in turn. */
static int own_datagrams(struct listener *l, struct epoll_event *event)
{
	struct worker *w = workers[(unsigned long)l->id % worker_count];
	if (!w->datagrams) {
		void *mapped = mmap(NULL, sizeof *w->datagrams, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		if (mapped == MAP_FAILED)
			return errno;
		w->datagrams = mapped;
	}
	l->buckets = calloc(BUCKETS, sizeof *l->buckets);
	if (!l->buckets)
		return ENOMEM;
	l->owner = w;
	*event = (struct epoll_event){.events = EPOLLIN, .data.ptr = (void *)((uintptr_t)l | DATAGRAM_LISTENER)};
	return 0;
}

static PyObject *relay_listen(PyObject *self, PyObject *args)
{
	(void)self;
	int fd, port, protocol, idle_s;
	const char *host;
	if (!PyArg_ParseTuple(args, "isiii:listen", &fd, &host, &port, &protocol, &idle_s))
		return NULL;
	struct listener *l = calloc(1, sizeof *l);
	if (!l)
		return PyErr_NoMemory();
	l->fd = fd;
	l->protocol = protocol;
	if (set_target(l, host, port) < 0) {
		free(l);
		PyErr_SetString(PyExc_ValueError, "listen: not an IP address");
		return NULL;
	}
	l->idle_s = idle_s;
	struct epoll_event event = {.events = EPOLLIN | EPOLLEXCLUSIVE, .data.ptr = (void *)((uintptr_t)l | STREAM_LISTENER)};
	int failed = worker_count ? 0 : ECANCELED;
	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&lock);
	l->id = next_id++;
	l->next = listeners;
	listeners = l;
	if (protocol == IPPROTO_UDP && !failed)
		failed = own_datagrams(l, &event);
	for (unsigned i = 0; i < worker_count && !failed; i++)
		if ((!l->owner || l->owner == workers[i]) && epoll_ctl(workers[i]->epoll, EPOLL_CTL_ADD, fd, &event) < 0)
			failed = errno;
	if (failed)
		withdraw(l);
	pthread_mutex_unlock(&lock);
	Py_END_ALLOW_THREADS
	return failed ? os_error(failed) : PyLong_FromLong(l->id);
}

static PyObject *relay_withdraw(PyObject *self, PyObject *args)
{
	(void)self;
	long id;
	if (!PyArg_ParseTuple(args, "l:withdraw", &id))
		return NULL;
	struct listener *l;
	Py_BEGIN_ALLOW_THREADS
	pthread_mutex_lock(&lock);
	l = find(id);
	if (l)
		withdraw(l);
	pthread_mutex_unlock(&lock);
	Py_END_ALLOW_THREADS
	if (!l)
		return os_error(ENOENT);
	Py_RETURN_NONE;
}

static PyObject *relay_connections(PyObject *self, PyObject *args)
{
	(void)self;
	long id;
	if (!PyArg_ParseTuple(args, "l:connections", &id))
		return NULL;
	pthread_mutex_lock(&lock);
	struct listener *l = find(id);
	int open = l ? atomic_load(&l->open) : -1;
	pthread_mutex_unlock(&lock);
	return open < 0 ? os_error(ENOENT) : PyLong_FromLong(open);
}

static PyMethodDef methods[] = {
	{"start", relay_start, METH_VARARGS, "start(workers): once, before anything else; raises OSError"},
	{"listen", relay_listen, METH_VARARGS, "listen(fd, host, port, protocol, idle_s) -> id; takes fd, which listens and does not block"},
	{"withdraw", relay_withdraw, METH_VARARGS, "withdraw(id): the port is free and its connections are closed; raises OSError"},
	{"connections", relay_connections, METH_VARARGS, "connections(id) -> how many are open; raises OSError"},
	{NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_relay", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__relay(void)
{
	return PyModule_Create(&module);
}

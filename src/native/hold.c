/* hold: what a shim is while it has nothing to do.
 *
 * The process that calls it is the parent of containers, and never comes back: it starts a worker, a fork of itself in which `hold`
 * returns, reaps, and sleeps. A worker that has nothing to do hands its descriptors back and ends; whatever happens at one of them
 * starts the next worker. So the process that lives as long as its containers do never runs the interpreter, and shares nearly
 * all of its memory with the process that it was forked from.
 *
 *   holder → worker   struct ended: a child of the holder has ended, or (pid 0) the holder was sent a signal
 *   worker → holder   struct interest for each descriptor that goes with the message: keep these, I am about to end;
 *                     without descriptors struct title and a text: what ps(1) shall show
 *
 * Both ends of the socket pair stay open in the holder: what one worker has not read is read by the next.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define Py_LIMITED_API 0x030b0000
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "hold.h"

enum { MOST = 240, AT_ONCE = 1 << 20, RETRY_MS = 100 };

struct ended {
	int64_t at_ns;
	int32_t pid;
	int32_t status; /* of wait(2), or the number of a signal */
};

struct interest {
	uint16_t events; /* of poll(2), at which a worker is needed */
	int16_t sink;    /* number of the descriptor that everything is to be spliced to, or -1 */
};

struct title {
	uint64_t address; /* of the memory that ps(1) looks at, the same in both since one is a fork of the other */
	uint64_t room;
};

struct holder {
	int signals, ours, theirs;
	pid_t worker;
	int count;
	int fds[MOST];
	struct interest interests[MOST];
};

static int tell(struct holder *h, pid_t pid, int status)
{
	struct timespec now;
	clock_gettime(CLOCK_REALTIME, &now);
	struct ended e = {(int64_t)now.tv_sec * 1000000000 + now.tv_nsec, pid, status};
	return send(h->ours, &e, sizeof e, MSG_NOSIGNAL) == sizeof e ? 0 : -1;
}

static int can_tell(struct holder *h)
{
	struct pollfd p = {h->ours, POLLOUT, 0};
	return poll(&p, 1, 0) == 1 && (p.revents & POLLOUT);
}

/* Take what signals there are, and tell of children that have ended as long as there is room for it. Returns whether some may be
 * left for want of room. */
static int reap(struct holder *h)
{
	struct signalfd_siginfo info;
	while (read(h->signals, &info, sizeof info) == sizeof info)
		if (info.ssi_signo != SIGCHLD && can_tell(h))
			tell(h, 0, (int)info.ssi_signo);
	for (;;) {
		if (!can_tell(h))
			return 1;
		int status;
		/* The worker is waited for by name: how it ended means something else. */
		siginfo_t child = {0};
		if (waitid(P_ALL, 0, &child, WEXITED | WNOHANG | WNOWAIT) < 0 || child.si_pid == 0)
			return 0;
		if (child.si_pid == h->worker)
			return 0;
		if (waitpid(child.si_pid, &status, WNOHANG) == child.si_pid)
			tell(h, child.si_pid, status);
	}
}

static void show(const char *data, size_t size)
{
	struct title title;
	if (size < sizeof title)
		return;
	memcpy(&title, data, sizeof title);
	size -= sizeof title;
	if (title.room && size < title.room) {
		char *shown = (char *)(uintptr_t)title.address;
		memset(shown, 0, title.room);
		memcpy(shown, data + sizeof title, size);
	}
	prctl(PR_SET_NAME, "containerd-shim", 0, 0, 0);
}

/* What the worker hands back. */
static void take(struct holder *h)
{
	char data[4096];
	union {
		char space[CMSG_SPACE(sizeof h->fds)];
		struct cmsghdr align;
	} control;
	struct iovec iov = {data, sizeof data};
	struct msghdr message = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = control.space, .msg_controllen = sizeof control.space};
	ssize_t size = recvmsg(h->ours, &message, MSG_CMSG_CLOEXEC);
	struct cmsghdr *head = size > 0 ? CMSG_FIRSTHDR(&message) : NULL;
	if (!head || head->cmsg_type != SCM_RIGHTS) {
		if (size > 0)
			show(data, (size_t)size);
		return;
	}
	int count = (int)((head->cmsg_len - CMSG_LEN(0)) / sizeof(int));
	memcpy(h->fds, CMSG_DATA(head), (size_t)count * sizeof(int));
	h->count = count;
	if ((message.msg_flags & MSG_CTRUNC) || (size_t)size != (size_t)count * sizeof(struct interest))
		h->count = 0; /* out of descriptors, or nonsense: the holder ends with the worker */
	else
		memcpy(h->interests, data, (size_t)size);
}

static void drop(struct holder *h)
{
	for (int i = 0; i < h->count; i++)
		close(h->fds[i]);
	h->count = 0;
}

/* Until the worker is over. Returns its wait status. */
static int attend(struct holder *h)
{
	int crowded = 0;
	for (;;) {
		int status;
		if (waitpid(h->worker, &status, WNOHANG) == h->worker) {
			struct pollfd last = {h->ours, POLLIN, 0};
			if (poll(&last, 1, 0) == 1 && (last.revents & POLLIN))
				take(h);
			h->worker = 0;
			return status;
		}
		struct pollfd polled[2] = {{h->signals, POLLIN, 0}, {h->ours, (short)(POLLIN | (crowded ? POLLOUT : 0)), 0}};
		if (poll(polled, 2, -1) < 0)
			continue;
		if (polled[1].revents & POLLIN)
			take(h);
		crowded = reap(h);
	}
}

/* Whether everything that was to be read has gone where it should, and no more is to be done. */
static int pass_on(int source, int sink)
{
	for (;;) {
		ssize_t moved = splice(source, NULL, sink, NULL, AT_ONCE, SPLICE_F_MOVE | SPLICE_F_NONBLOCK);
		if (moved > 0)
			continue;
		int left = 1;
		return moved < 0 && errno == EAGAIN && ioctl(source, FIONREAD, &left) == 0 && left == 0;
	}
}

/* Until a worker is needed. */
static void sleep_on(struct holder *h)
{
	struct pollfd polled[MOST + 2];
	polled[0] = (struct pollfd){h->signals, POLLIN, 0};
	polled[1] = (struct pollfd){h->theirs, POLLIN, 0};
	for (int i = 0; i < h->count; i++)
		polled[2 + i] = (struct pollfd){h->interests[i].events ? h->fds[i] : -1, (short)h->interests[i].events, 0};
	for (;;) {
		reap(h);
		if (poll(polled, (nfds_t)h->count + 2, -1) < 0)
			continue;
		if (polled[1].revents)
			return;
		for (int i = 0; i < h->count; i++) {
			int sink = h->interests[i].sink;
			if (polled[2 + i].revents && (sink < 0 || sink >= h->count || !pass_on(h->fds[i], h->fds[sink])))
				return;
		}
	}
}

/* In the worker. */
static PyObject *begin(struct holder *h, const sigset_t *before, pid_t holder)
{
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (getppid() != holder)
		_exit(1);
	close(h->signals);
	close(h->ours);
	sigprocmask(SIG_SETMASK, before, NULL);
	PyObject *fds = PyList_New(h->count);
	for (int i = 0; fds && i < h->count; i++) {
		PyObject *fd = PyLong_FromLong(h->fds[i]);
		if (!fd)
			return NULL;
		PyList_SetItem(fds, i, fd);
	}
	return fds ? Py_BuildValue("(iN)", h->theirs, fds) : NULL;
}

PyObject *sys_hold(PyObject *self, PyObject *args)
{
	(void)self;
	struct holder h = {.count = 1};
	if (!PyArg_ParseTuple(args, "i", &h.fds[0]))
		return NULL;
	int pair[2];
	sigset_t wanted, before;
	sigemptyset(&wanted);
	sigaddset(&wanted, SIGCHLD);
	sigaddset(&wanted, SIGTERM);
	sigaddset(&wanted, SIGINT);
	sigprocmask(SIG_BLOCK, &wanted, &before);
	h.signals = signalfd(-1, &wanted, SFD_CLOEXEC | SFD_NONBLOCK);
	if (h.signals < 0 || prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) < 0 ||
	    socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, pair) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	h.ours = pair[0];
	h.theirs = pair[1];
	pid_t self_pid = getpid();
	for (;;) {
		PyOS_BeforeFork();
		h.worker = fork();
		if (h.worker == 0) {
			PyOS_AfterFork_Child();
			return begin(&h, &before, self_pid);
		}
		PyOS_AfterFork_Parent();
		if (h.worker < 0) {
			h.worker = 0;
			poll(NULL, 0, RETRY_MS); /* too many processes, or no memory: containers and callers wait */
			continue;
		}
		drop(&h);
		int status = attend(&h);
		if (!h.count)
			_exit(WIFEXITED(status) ? WEXITSTATUS(status) : 1);
		sleep_on(&h);
	}
}

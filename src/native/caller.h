/* How a native entry finds the Python process that does its work, and says who it is: for boxrun.c and for shim.c.
 *
 * {version, argc, envc, umask} goes out with the descriptors 0, 1, 2, the folder, and a file of all strings, each with a NUL
 * behind it. What comes back is the includer's affair.
 */
#ifndef BOXSHIP_CALLER_H
#define BOXSHIP_CALLER_H

#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "spawn.h"

enum { MAX_FDS = 200 };

struct word { int32_t what, a, b, c; };

static int worker = -1;

static int send_word(struct word word, const int *fds, int count)
{
	struct iovec vec = {&word, sizeof word};
	union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int) * MAX_FDS)]; } control;
	struct msghdr msg = {.msg_iov = &vec, .msg_iovlen = 1};
	if (count) {
		msg.msg_control = &control;
		msg.msg_controllen = CMSG_SPACE(sizeof(int) * count);
		struct cmsghdr *header = CMSG_FIRSTHDR(&msg);
		header->cmsg_level = SOL_SOCKET;
		header->cmsg_type = SCM_RIGHTS;
		header->cmsg_len = CMSG_LEN(sizeof(int) * count);
		memcpy(CMSG_DATA(header), fds, sizeof(int) * count);
	}
	ssize_t sent;
	do
		sent = sendmsg(worker, &msg, MSG_NOSIGNAL);
	while (sent < 0 && errno == EINTR);
	return sent < 0 ? -1 : 0;
}

/* 1: a word came, with *count descriptors; 0: the worker is gone. */
static int receive_word(struct word *word, int *fds, int *count)
{
	struct iovec vec = {word, sizeof *word};
	union { struct cmsghdr header; char space[CMSG_SPACE(sizeof(int) * SPAWN_MAX_FDS)]; } control;
	struct msghdr msg = {.msg_iov = &vec, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
	ssize_t got;
	do
		got = recvmsg(worker, &msg, MSG_CMSG_CLOEXEC);
	while (got < 0 && errno == EINTR);
	*count = 0;
	struct cmsghdr *header = got > 0 ? CMSG_FIRSTHDR(&msg) : NULL;
	if (header && header->cmsg_type == SCM_RIGHTS) {
		*count = (int)((header->cmsg_len - CMSG_LEN(0)) / sizeof(int));
		memcpy(fds, CMSG_DATA(header), sizeof(int) * *count);
	}
	return got == sizeof *word;
}

/* --- where the worker is ----------------------------------------------------------------------------------------- */

static uint64_t hash = 14695981039346656037u;

static void mix(const void *data, size_t size)
{
	for (const unsigned char *byte = data; size--; byte++)
		hash = (hash ^ *byte) * 1099511628211u;  /* FNV-1a */
}

/* A worker serves those who see and may exactly what it does: same namespaces, user, capabilities, confinement. */
static int find_worker(char *path, size_t size, const char *exe, const char *kind)
{
	static const char *const kinds[] = {"mnt", "pid", "net", "user", "uts", "ipc", "cgroup", "time"};
	static char status[1 << 16];  /* a user may be in thousands of groups */
	char name[64];
	for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++) {
		struct stat info;
		snprintf(name, sizeof name, "/proc/self/ns/%s", kinds[i]);
		if (stat(name, &info) < 0)
			memset(&info, 0, sizeof info);
		mix(&info.st_ino, sizeof info.st_ino);
	}
	struct stat root;
	if (stat("/", &root) < 0)
		return -1;
	mix(&root.st_ino, sizeof root.st_ino);
	mix(&root.st_dev, sizeof root.st_dev);
	int fd = open("/proc/self/status", O_RDONLY | O_CLOEXEC);
	ssize_t got = fd < 0 ? -1 : read(fd, status, sizeof status - 1);
	close(fd);
	if (got <= 0)
		return -1;
	status[got] = 0;
	static const char *const fields[] = {
		"\nUid:", "\nGid:", "\nGroups:", "\nCapInh:", "\nCapPrm:", "\nCapEff:", "\nCapBnd:", "\nCapAmb:", "\nNoNewPrivs:", "\nSeccomp:",
	};
	for (size_t i = 0; i < sizeof fields / sizeof *fields; i++) {
		const char *line = strstr(status, fields[i]);
		if (!line)
			return -1;
		mix(line, strcspn(line + 1, "\n") + 1);
	}
	/* The security module's label; without one there is nothing to read. */
	fd = open("/proc/self/attr/current", O_RDONLY | O_CLOEXEC);
	got = fd < 0 ? -1 : read(fd, status, sizeof status);
	if (fd >= 0)
		close(fd);
	if (got > 0)
		mix(status, (size_t)got);
	mix(exe, strlen(exe));
	const char *base = "/run";
	if (geteuid() != 0) {
		base = getenv("XDG_RUNTIME_DIR");
		if (!base || !*base)
			return -1;
	}
	return snprintf(path, size, "%s/boxship/%s/%016llx", base, kind, (unsigned long long)hash) < (int)size ? 0 : -1;
}

static int connect_worker(const char *path)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	if (strlen(path) >= sizeof address.sun_path)
		return -1;
	strcpy(address.sun_path, path);
	/* High, so that a descriptor that the caller promises to the container is not mistaken. */
	int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return -1;
	worker = fcntl(fd, F_DUPFD_CLOEXEC, 512);
	if (worker >= 0)
		close(fd);
	else
		worker = fd;
	/* Whoever made the socket gets our descriptors and environment: nobody else's shall. */
	struct ucred server;
	socklen_t length = sizeof server;
	if (connect(worker, (struct sockaddr *)&address, sizeof address) == 0
	    && getsockopt(worker, SOL_SOCKET, SO_PEERCRED, &server, &length) == 0 && server.uid == geteuid())
		return 0;
	close(worker);
	return -1;
}

static int introduce(int version, int argc, char **argv, char **envp)
{
	int envc = 0;
	while (envp[envc])
		envc++;
	int strings = memfd_create("caller", MFD_CLOEXEC);
	if (strings < 0)
		return -1;
	size_t size = 0;
	for (int i = 0; i < argc + envc; i++)
		size += strlen(i < argc ? argv[i] : envp[i - argc]) + 1;
	char *text = malloc(size + 1), *at = text;
	if (!text)
		return -1;
	for (int i = 0; i < argc + envc; i++)
		at = stpcpy(at, i < argc ? argv[i] : envp[i - argc]) + 1;
	ssize_t written = write(strings, text, size);
	free(text);
	int folder = open(".", O_PATH | O_DIRECTORY | O_CLOEXEC);
	mode_t mask = umask(0);
	umask(mask);
	int fds[] = {0, 1, 2, folder, strings};
	int result = written == (ssize_t)size && folder >= 0
		? send_word((struct word){version, argc, envc, (int)mask}, fds, 5) : -1;
	close(folder);
	close(strings);
	return result;
}

#endif

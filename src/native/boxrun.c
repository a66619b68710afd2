/* boxrun: the native entry of the runtime's command line.
 *
 * An interpreter needs longer to start than a container does. So the work is done by a warm worker, a process forked from
 * one that has everything imported (boxship/runtime/warm.py), and this program only lends it what must be the caller's
 * own: arguments, environment, folder and descriptors, and its place as the parent of the container's processes. It starts
 * them on request and waits for them. When no worker is there it becomes the interpreter itself.
 *
 *     boxrun                                          worker
 *       connect, {version, argc, envc, umask} + fds 0 1 2 cwd strings ──►  checks who that is
 *       ◄── {SPAWN, clone flags, whether a cgroup comes last} + exe, descriptors, cgroup
 *       clone, execveat; {pid or -errno} ──►
 *       ◄── {WAIT, pid}          {wait status} ──►
 *       ◄── {FDS, count, first}  {0 or -errno} + descriptors from there on ──►
 *       ◄── {ATTEND, pid, terminal}
 *       passes signals on; {WINDOW} ──► when the terminal's size changed; {ENDED, status} ──►
 *       ◄── {EXIT, code}
 *
 * A worker that goes away before its first word was not the right one (an old version, another identity): then the
 * interpreter does it after all.
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>

#include "spawn.h"

enum { VERSION = 2 };
enum { SPAWN = 1, WAIT, FDS, ATTEND, EXIT };
enum { REPLY = 0, WINDOW, ENDED };
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
static int find_worker(char *path, size_t size, const char *exe)
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
	return snprintf(path, size, "%s/boxship/warm/%016llx", base, (unsigned long long)hash) < (int)size ? 0 : -1;
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

static int introduce(int argc, char **argv, char **envp)
{
	int envc = 0;
	while (envp[envc])
		envc++;
	int strings = memfd_create("boxrun", MFD_CLOEXEC);
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
		? send_word((struct word){VERSION, argc, envc, (int)mask}, fds, 5) : -1;
	close(folder);
	close(strings);
	return result;
}

/* --- what the worker asks for ------------------------------------------------------------------------------------ */

static void do_spawn(struct word word, const int *fds, int count)
{
	char *const argv[] = {"boxrun-init", NULL};
	int cgroup = word.b && count > 1 ? fds[--count] : -1;
	pid_t pid = count > 1 ? spawn(fds[0], argv, fds + 1, count - 1, word.a, cgroup) : (errno = EINVAL, -1);
	send_word((struct word){REPLY, pid < 0 ? -errno : pid, 0, 0}, NULL, 0);
}

static void do_wait(int pid)
{
	int status = 0, result;
	do
		result = waitpid(pid, &status, 0);
	while (result < 0 && errno == EINTR);
	send_word((struct word){REPLY, result < 0 ? -errno : 0, status, 0}, NULL, 0);
}

static void give_descriptors(int count, int first)
{
	int fds[MAX_FDS];
	for (int i = 0; i < count && i < MAX_FDS; i++) {
		fds[i] = first + i;
		if (fcntl(fds[i], F_GETFD) < 0 || fds[i] == worker)
			count = -1;
	}
	if (count < 0 || count > MAX_FDS)
		send_word((struct word){REPLY, -EBADF, 0, 0}, NULL, 0);
	else
		send_word((struct word){REPLY, 0, 0, 0}, fds, count);
}

static int attend(int pid, int terminal)
{
	sigset_t all;
	sigfillset(&all);
	sigprocmask(SIG_SETMASK, &all, NULL);
	struct pollfd polls[] = {{signalfd(-1, &all, SFD_CLOEXEC), POLLIN, 0}};
	for (;;) {
		/* First: it may be over already, its signal taken while others were blocked. */
		int status;
		if (waitpid(pid, &status, WNOHANG) == pid) {
			send_word((struct word){ENDED, status, 0, 0}, NULL, 0);
			return WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
		}
		struct signalfd_siginfo info;
		if (poll(polls, 1, -1) < 0 || read(polls[0].fd, &info, sizeof info) != sizeof info)
			continue;
		if (info.ssi_signo == SIGWINCH && terminal)
			send_word((struct word){WINDOW, 0, 0, 0}, NULL, 0);
		else if (info.ssi_signo != SIGCHLD && info.ssi_signo != SIGURG && info.ssi_signo != SIGPIPE)
			kill(pid, (int)info.ssi_signo);
	}
}

/* The exit code, or -1 when the worker never said a word. */
static int serve(void)
{
	struct word word;
	int fds[SPAWN_MAX_FDS], count, code = -1, started = 0;
	while (receive_word(&word, fds, &count)) {
		started = 1;
		switch (word.what) {
		case SPAWN: do_spawn(word, fds, count); break;
		case WAIT: do_wait(word.a); break;
		case FDS: give_descriptors(word.a, word.b); break;
		case ATTEND: code = attend(word.a, word.b); break;
		case EXIT: return word.a;
		}
		for (int i = 0; i < count; i++)
			close(fds[i]);
	}
	if (!started)
		return -1;
	if (code < 0) {
		fputs("boxrun: the worker that did the work was killed; delete --force removes what it left\n", stderr);
		code = 1;
	}
	return code;
}

/* --- without a worker -------------------------------------------------------------------------------------------- */

static int become_interpreter(const char *exe, const char *socket, int argc, char **argv)
{
	char python[4096 + 16];
	const char *slash = strrchr(exe, '/');
	static const char *const names[] = {"python3", "python"};
	char **args = calloc(argc + 5, sizeof *args);
	if (!slash || !args)
		return 1;
	args[1] = "-I";
	args[2] = "-m";
	args[3] = "boxship.runtime.command";
	for (int i = 1; i < argc; i++)
		args[3 + i] = argv[i];
	setenv("BOXRUN_ARGV0", argv[0], 1);
	if (socket)
		setenv("BOXRUN_WARM_SOCKET", socket, 1);
	for (size_t i = 0; i < 2; i++) {
		snprintf(python, sizeof python, "%.*s/%s", (int)(slash - exe), exe, names[i]);
		args[0] = python;
		execv(python, args);
	}
	fprintf(stderr, "boxrun: no Python interpreter beside %s: install the package again\n", exe);
	return 1;
}

int main(int argc, char **argv, char **envp)
{
	char exe[4096], path[256];
	ssize_t length = readlink("/proc/self/exe", exe, sizeof exe - 1);
	if (length < 0 || argc < 1) {
		fputs("boxrun: /proc is not mounted\n", stderr);
		return 1;
	}
	exe[length] = 0;
	/* Closed standard streams would make descriptors of ours look like the container's. */
	for (int fd; (fd = open("/dev/null", O_RDWR)) >= 0;)
		if (fd > 2) {
			close(fd);
			break;
		}
	const char *wanted = getenv("BOXRUN_WARM");
	if ((wanted && !strcmp(wanted, "0")) || getenv("BOXSHIP_FAILPOINT") || find_worker(path, sizeof path, exe) < 0)
		return become_interpreter(exe, NULL, argc, argv);
	if (connect_worker(path) == 0 && introduce(argc, argv, envp) == 0) {
		int code = serve();
		if (code >= 0)
			return code;
	}
	return become_interpreter(exe, path, argc, argv);
}

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
#include <sys/signalfd.h>

#include "caller.h"

enum { VERSION = 2 };
enum { SPAWN = 1, WAIT, FDS, ATTEND, EXIT };
enum { REPLY = 0, WINDOW, ENDED };

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
	if ((wanted && !strcmp(wanted, "0")) || getenv("BOXSHIP_FAILPOINT") || find_worker(path, sizeof path, exe, "warm") < 0)
		return become_interpreter(exe, NULL, argc, argv);
	if (connect_worker(path) == 0 && introduce(VERSION, argc, argv, envp) == 0) {
		int code = serve();
		if (code >= 0)
			return code;
	}
	return become_interpreter(exe, path, argc, argv);
}

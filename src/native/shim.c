/* containerd-shim-boxship-v1: the native entry of the shim's command line.
 *
 * containerd starts this program, and waits for it, for every container. It hands all that it was given to the spawner
 * (boxship/shim/spawner.py), which forks: the fork answers on our standard output and, for `start`, becomes the shim. When no
 * spawner is there, one is started, and waited for.
 */
#define _GNU_SOURCE
#include <time.h>

#include "caller.h"

enum { VERSION = 1, EXIT = 5 };
enum { PATIENCE_MS = 30000, AGAIN_MS = 2000, LOOK_MS = 4 };

static int64_t now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

/* The exit code, or -1 when the spawner went away without a word: it was just ending, or is another version. */
static int ask(const char *path, int argc, char **argv, char **envp)
{
	struct word word;
	int fds[SPAWN_MAX_FDS], count;
	if (connect_worker(path) < 0)
		return -1;
	int code = introduce(VERSION, argc, argv, envp) == 0 && receive_word(&word, fds, &count) && word.what == EXIT ? word.a : -1;
	close(worker);
	return code;
}

/* Detached in every way: its caller's streams would stay open, and containerd reads ours to the end. */
static void launch(const char *exe, const char *path)
{
	pid_t pid = fork();
	if (pid > 0)
		waitpid(pid, NULL, 0);
	if (pid != 0)
		return;
	setsid();
	if (fork() != 0)
		_exit(0);
	char python[4096 + 16], log[300];
	const char *slash = strrchr(exe, '/');
	snprintf(log, sizeof log, "%s.log", path);
	int null = open("/dev/null", O_RDWR);
	int out = open(log, O_WRONLY | O_CREAT | O_TRUNC | O_NOFOLLOW | O_CLOEXEC, 0600);
	dup2(null, 0);
	dup2(out < 0 ? null : out, 1);
	dup2(out < 0 ? null : out, 2);
	close_range(3, ~0u, 0);
	if (chdir("/") < 0)
		_exit(127);
	static const char *const names[] = {"python3", "python"};
	char *args[] = {python, "-I", "-m", "boxship.daemon.spawner", (char *)path, NULL};
	/* Of the caller's environment: whose spawner it is, and where that user's state lies. */
	static const char *const kept[] = {"XDG_RUNTIME_DIR", "BOXSHIP_ROOTLESS_UID"};
	char variables[2][4200];
	char *environment[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", NULL, NULL, NULL};
	for (size_t i = 0, used = 1; i < 2; i++) {
		const char *value = getenv(kept[i]);
		if (!value)
			continue;
		snprintf(variables[i], sizeof variables[i], "%s=%s", kept[i], value);
		environment[used++] = variables[i];
	}
	for (size_t i = 0; i < 2; i++) {
		snprintf(python, sizeof python, "%.*s/%s", (int)(slash - exe), exe, names[i]);
		execve(python, args, environment);
	}
	_exit(127);
}

static int make_folder(const char *path)
{
	char folder[256];
	snprintf(folder, sizeof folder, "%s", path);
	char *last = strrchr(folder, '/');
	*last = 0;
	char *before = strrchr(folder, '/');
	*before = 0;
	mkdir(folder, 0711);
	*before = '/';
	return mkdir(folder, 0700) < 0 && errno != EEXIST ? -1 : 0;
}

int main(int argc, char **argv, char **envp)
{
	char exe[4096], path[256];
	ssize_t length = readlink("/proc/self/exe", exe, sizeof exe - 1);
	if (length < 0 || argc < 1) {
		fputs("containerd-shim-boxship-v1: /proc is not mounted\n", stderr);
		return 1;
	}
	exe[length] = 0;
	/* Closed standard streams would make descriptors of ours look like the caller's. */
	for (int fd; (fd = open("/dev/null", O_RDWR)) >= 0;)
		if (fd > 2) {
			close(fd);
			break;
		}
	const char *given = getenv("BOXSHIP_SPAWNER");
	if (given && *given && strlen(given) < sizeof path)
		strcpy(path, given);
	else if (find_worker(path, sizeof path, exe, "spawner") < 0) {
		fputs("containerd-shim-boxship-v1: no place for the spawner's socket: set XDG_RUNTIME_DIR\n", stderr);
		return 1;
	}
	int code = ask(path, argc, argv, envp);
	if (code >= 0)
		return code;
	if (make_folder(path) < 0) {
		fprintf(stderr, "containerd-shim-boxship-v1: mkdir for %s: %s\n", path, strerror(errno));
		return 1;
	}
	for (int64_t start = now_ms(), launched = -1, waited; (waited = now_ms() - start) < PATIENCE_MS;) {
		/* Again now and then: the one that was ending may have held the place. */
		if (launched < 0 || waited - launched >= AGAIN_MS) {
			launch(exe, path);
			launched = waited;
		}
		struct timespec pause = {0, LOOK_MS * 1000000};
		nanosleep(&pause, NULL);
		code = ask(path, argc, argv, envp);
		if (code >= 0)
			return code;
	}
	fprintf(stderr, "containerd-shim-boxship-v1: the spawner does not start: see %s.log\n", path);
	return 1;
}

/* clone + execveat of an open program, for the interpreter (sys.c) and for the native entry (boxrun.c).
 *
 * The child shares the caller's memory until the exec (CLONE_VM, CLONE_VFORK): no page tables are copied, and between the
 * two it makes system calls only.
 */
#ifndef BOXSHIP_SPAWN_H
#define BOXSHIP_SPAWN_H

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define SPAWN_MAX_FDS 16

struct spawn_plan {
	int exe;
	char *const *argv;
	char *const *envp;
	const int *fds;      /* fds[i] becomes descriptor i */
	int fd_count;
	volatile int error;
};

static int spawn_child(void *argument)
{
	struct spawn_plan *plan = argument;
	/* Dispositions and mask are inherited by the program: give it the defaults. Python ignores SIGPIPE and SIGXFSZ. */
	struct { void *handler; unsigned long flags; void *restorer; unsigned long mask; } dfl = {0};
	for (int sig = 1; sig < 65; sig++)
		syscall(SYS_rt_sigaction, sig, &dfl, NULL, 8);
	unsigned long none = 0;
	/* First out of the way of the low numbers, then into place. */
	int high[SPAWN_MAX_FDS];
	for (int i = 0; i < plan->fd_count; i++) {
		high[i] = (int)syscall(SYS_fcntl, plan->fds[i], F_DUPFD_CLOEXEC, 64);
		if (high[i] < 0)
			goto fail;
	}
	int exe = (int)syscall(SYS_fcntl, plan->exe, F_DUPFD_CLOEXEC, 64);
	if (exe < 0)
		goto fail;
	for (int i = 0; i < plan->fd_count; i++)
		if (syscall(SYS_dup3, high[i], i, 0) < 0)
			goto fail;
	/* Everything else closes at exec: no descriptor of the caller reaches a container. */
	if (syscall(SYS_close_range, plan->fd_count, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */) < 0)
		goto fail;
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
	syscall(SYS_execveat, exe, "", plan->argv, plan->envp, 0x1000 /* AT_EMPTY_PATH */);
fail:
	plan->error = errno;
	_exit(127);
}

/* The new process's pid, or -1 with errno. `flags`: new namespaces. */
static pid_t spawn(int exe, char *const *argv, const int *fds, int fd_count, int flags)
{
	static char *const envp[] = {NULL};
	struct spawn_plan plan = {exe, argv, envp, fds, fd_count, 0};
	/* With every signal blocked no handler can run on the shared memory of the child. */
	unsigned long all = ~0UL, old = 0;
	syscall(SYS_rt_sigprocmask, SIG_BLOCK, &all, &old, 8);
	static _Alignas(16) char stack[16384];
	pid_t pid = clone(spawn_child, stack + sizeof stack, CLONE_VM | CLONE_VFORK | SIGCHLD | flags, &plan);
	int saved = errno;
	syscall(SYS_rt_sigprocmask, SIG_SETMASK, &old, NULL, 8);
	if (pid >= 0 && plan.error) {
		waitpid(pid, NULL, 0);
		saved = plan.error;
		pid = -1;
	}
	errno = saved;
	return pid;
}

#endif

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * Runs the host's commands, several concurrently, over a virtio-serial port.
 *
 *   agent PORT
 *
 * It opens PORT, goes into the background and serves for as long as the guest lives. A frame is one
 * byte (its kind), the number of the command (u32), the length of the payload (u32), both in network
 * byte order, and the payload:
 *
 *   host:   r  a command for /bin/sh -c
 *           i  data for the command's standard input; no data: its end
 *           h  is answered with the same frame
 *   agent:  o  data from its standard output
 *           e  data from its standard error
 *           x  its status as waitpid(2) has it (u32), after all that it has written until its end; what
 *              it left in the background has no output any more
 *           f  an errno (u32): it could not be started
 *
 * This takes a guest under TCG a fifth of the time of an ssh channel. Input waits here without a
 * limit, output in the pipe of the command.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define CHUNK 32768
#define MOST_PAYLOAD (64u << 20)

struct header {
	uint8_t kind;
	uint32_t number, length;
} __attribute__((packed));

struct command {
	struct command *next;
	uint32_t number;
	pid_t pid; /* 0: it has ended, with `status` */
	int status;
	int in, out, err; /* -1: closed */
	char *input;
	size_t length, written;
	int input_ends;
};

extern char **environ;
static struct command *commands;
static int port;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void pause_ms(long ms)
{
	nanosleep(&(struct timespec){ ms / 1000, ms % 1000 * 1000000 }, NULL);
}

static void send_all(const void *data, size_t length)
{
	const char *rest = data;

	while (length) {
		ssize_t sent = write(port, rest, length);

		if (sent < 0 && errno != EINTR && errno != EAGAIN)
			die("write");
		if (sent <= 0) {
			pause_ms(1);
			continue;
		}
		rest += sent;
		length -= sent;
	}
}

static void answer(char kind, uint32_t number, const void *data, uint32_t length)
{
	/* One write for each frame: each one wakes QEMU. */
	static char frame[sizeof(struct header) + CHUNK];
	struct header header = { kind, htonl(number), htonl(length) };

	memcpy(frame, &header, sizeof(header));
	memcpy(frame + sizeof(header), data, length);
	send_all(frame, sizeof(header) + length);
}

static void answer_number(char kind, uint32_t number, uint32_t value)
{
	value = htonl(value);
	answer(kind, number, &value, sizeof(value));
}

static void receive(void *data, size_t length)
{
	char *rest = data;

	while (length) {
		ssize_t got = read(port, rest, length);

		if (got < 0 && errno != EINTR && errno != EAGAIN)
			die("read");
		if (got <= 0) {
			/* The host is not connected. */
			pause_ms(5);
			continue;
		}
		rest += got;
		length -= got;
	}
}

static void hang_up(int *fd)
{
	if (*fd >= 0)
		close(*fd);
	*fd = -1;
}

/* A process group of its own, with no signal blocked or ignored, as a login shell has it. */
static int spawn(struct command *command, char *text)
{
	char *argv[] = { "sh", "-c", text, NULL };
	int in[2], out[2], err[2], error;
	posix_spawn_file_actions_t actions;
	posix_spawnattr_t attributes;
	sigset_t none, all;

	if (pipe2(in, O_CLOEXEC) || pipe2(out, O_CLOEXEC) || pipe2(err, O_CLOEXEC))
		return errno;
	sigemptyset(&none);
	sigfillset(&all);
	posix_spawn_file_actions_init(&actions);
	posix_spawn_file_actions_adddup2(&actions, in[0], 0);
	posix_spawn_file_actions_adddup2(&actions, out[1], 1);
	posix_spawn_file_actions_adddup2(&actions, err[1], 2);
	posix_spawnattr_init(&attributes);
	posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSID | POSIX_SPAWN_SETSIGMASK |
						      POSIX_SPAWN_SETSIGDEF);
	posix_spawnattr_setsigmask(&attributes, &none);
	posix_spawnattr_setsigdefault(&attributes, &all);
	error = posix_spawn(&command->pid, "/bin/sh", &actions, &attributes, argv, environ);
	posix_spawnattr_destroy(&attributes);
	posix_spawn_file_actions_destroy(&actions);
	close(in[0]);
	close(out[1]);
	close(err[1]);
	command->in = in[1];
	command->out = out[0];
	command->err = err[0];
	fcntl(command->in, F_SETFL, O_NONBLOCK);
	fcntl(command->out, F_SETFL, O_NONBLOCK);
	fcntl(command->err, F_SETFL, O_NONBLOCK);
	return error;
}

static void start(uint32_t number, char *text)
{
	struct command *command = calloc(1, sizeof(*command));
	int error;

	if (!command)
		die("calloc");
	command->number = number;
	command->in = command->out = command->err = -1;
	error = spawn(command, text);
	if (error) {
		answer_number('f', number, error);
		hang_up(&command->in);
		hang_up(&command->out);
		hang_up(&command->err);
		free(command);
		return;
	}
	command->next = commands;
	commands = command;
}

static void feed(struct command *command)
{
	while (command->in >= 0 && command->written < command->length) {
		ssize_t sent = write(command->in, command->input + command->written,
				     command->length - command->written);

		if (sent < 0 && errno == EINTR)
			continue;
		if (sent < 0 && errno == EAGAIN)
			return;
		if (sent < 0) {
			/* It does not read to the end. */
			hang_up(&command->in);
			return;
		}
		command->written += sent;
	}
	command->length = command->written = 0;
	if (command->input_ends)
		hang_up(&command->in);
}

static void take_input(uint32_t number, const char *data, uint32_t length)
{
	struct command *command = commands;

	while (command && command->number != number)
		command = command->next;
	if (!command)
		return;
	if (!length) {
		command->input_ends = 1;
	} else {
		command->input = realloc(command->input, command->length + length);
		if (!command->input)
			die("realloc");
		memcpy(command->input + command->length, data, length);
		command->length += length;
	}
	feed(command);
}

static void take_frame(void)
{
	struct header header;
	uint32_t length, number;
	char *payload;

	receive(&header, sizeof(header));
	number = ntohl(header.number);
	length = ntohl(header.length);
	if (length > MOST_PAYLOAD) {
		errno = EMSGSIZE;
		die("frame");
	}
	payload = malloc(length + 1);
	if (!payload)
		die("malloc");
	receive(payload, length);
	payload[length] = '\0';
	if (header.kind == 'r')
		start(number, payload);
	else if (header.kind == 'i')
		take_input(number, payload, length);
	else if (header.kind == 'h')
		answer('h', number, payload, length < CHUNK ? length : CHUNK);
	free(payload);
}

/* True if there may be more. */
static int pass_on(struct command *command, int *fd, char kind)
{
	static char chunk[CHUNK];
	ssize_t got = *fd < 0 ? 0 : read(*fd, chunk, sizeof(chunk));

	if (got > 0)
		answer(kind, command->number, chunk, got);
	else if (got == 0 || (errno != EINTR && errno != EAGAIN))
		hang_up(fd);
	return got > 0;
}

static void reap(void)
{
	struct command *command;
	int status;
	pid_t pid;

	while ((pid = waitpid(-1, &status, WNOHANG)) > 0)
		for (command = commands; command; command = command->next)
			if (command->pid == pid) {
				command->pid = 0;
				command->status = status;
			}
}

static void finish(void)
{
	struct command **link = &commands, *command;

	while ((command = *link)) {
		if (command->pid) {
			link = &command->next;
			continue;
		}
		while (pass_on(command, &command->out, 'o'))
			;
		while (pass_on(command, &command->err, 'e'))
			;
		hang_up(&command->out);
		hang_up(&command->err);
		answer_number('x', command->number, command->status);
		hang_up(&command->in);
		free(command->input);
		*link = command->next;
		free(command);
	}
}

static void serve(int signals)
{
	struct pollfd *fds = NULL, *fd;
	size_t room = 0, count;
	struct command *command;

	for (;;) {
		count = 2;
		for (command = commands; command; command = command->next)
			count += 3;
		if (count > room) {
			room = 2 * count;
			fds = realloc(fds, room * sizeof(*fds));
			if (!fds)
				die("realloc");
		}
		fds[0] = (struct pollfd){ port, POLLIN, 0 };
		fds[1] = (struct pollfd){ signals, POLLIN, 0 };
		fd = fds + 2;
		for (command = commands; command; command = command->next) {
			*fd++ = (struct pollfd){ command->out, POLLIN, 0 };
			*fd++ = (struct pollfd){ command->err, POLLIN, 0 };
			*fd++ = (struct pollfd){ command->length ? command->in : -1, POLLOUT, 0 };
		}
		if (poll(fds, count, -1) < 0 && errno != EINTR)
			die("poll");
		if (fds[1].revents) {
			struct signalfd_siginfo info;

			if (read(signals, &info, sizeof(info)) < 0 && errno != EAGAIN)
				die("signalfd");
			reap();
		}
		fd = fds + 2;
		for (command = commands; command; command = command->next) {
			if (fd++->revents)
				pass_on(command, &command->out, 'o');
			if (fd++->revents)
				pass_on(command, &command->err, 'e');
			if (fd++->revents)
				feed(command);
		}
		/* Last, because it may put a command in front of the list. */
		if (fds[0].revents & POLLIN)
			take_frame();
		else if (fds[0].revents & POLLHUP)
			pause_ms(5);
		finish();
	}
}

int main(int argc, char **argv)
{
	const char *home = getenv("HOME");
	sigset_t child;
	pid_t pid;
	int signals;

	if (argc != 2) {
		fprintf(stderr, "usage: agent PORT\n");
		return 2;
	}
	port = open(argv[1], O_RDWR | O_CLOEXEC);
	if (port < 0)
		die(argv[1]);
	pid = fork();
	if (pid < 0)
		die("fork");
	if (pid)
		return 0;
	/* What a restored guest needs first should not have to come from its disk. */
	if (mlockall(MCL_CURRENT))
		die("mlockall");
	setsid();
	if (home && chdir(home))
		die(home);
	signal(SIGPIPE, SIG_IGN);
	sigemptyset(&child);
	sigaddset(&child, SIGCHLD);
	sigprocmask(SIG_BLOCK, &child, NULL);
	signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
	if (signals < 0)
		die("signalfd");
	serve(signals);
	return 0;
}

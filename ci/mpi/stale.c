// SPDX-License-Identifier: GPL-2.0
/*
 * Two MPI ranks. Rank 0 uses a buffer, so that a library below MPI registers it and
 * caches the registration, changes the mapping of the buffer, and uses it again: sends
 * from it or receives into it. Rank 1 has a buffer that stays. All data is compared, and
 * each transfer has data of its own, so stale pages show up as wrong bytes.
 *
 * stale list				the changes, and what they are
 * stale rows CHANGE,...|all SIZE,...	a line for each change, direction and size
 * stale fork CHANGE,...|all SIZE,...	the same, with fork() and exec() between transfers
 * stale threads ROUNDS SEED		threads that change and transfer buffers of their own
 * stale soak SECONDS SEED [STEPS]	random changes and transfers of parts of buffers; the
 *					same seed gives the same steps
 * stale cost				what a transfer costs, on one CPU whose time-stamp counter
 *					counts instructions
 *
 * Exit code: 0 if the program ran to its end, whatever it saw. The lines tell.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <liburing.h>
#include <linux/perf_event.h>
#include <link.h>
#include <mpi.h>
#include <pthread.h>
#include <spawn.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#include "plugin.h"

#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_GUARD_INSTALL
#define MADV_GUARD_INSTALL 102
#define MADV_GUARD_REMOVE 103
#endif

#define MAX_SIZE ((size_t)1 << 20)
#define PAGE ((size_t)4096)
#define THREADS 4

static void die(const char *what)
{
	fprintf(stderr, "stale: %s: %s\n", what, strerror(errno));
	MPI_Abort(MPI_COMM_WORLD, 2);
	abort();
}

/* CHECK - ends the program if a call of the set-up fails. */
#define CHECK(call)                                                            \
	({                                                                     \
		__auto_type check_ret = (call);                                \
		if ((intptr_t)check_ret == -1)                                 \
			die(#call);                                            \
		check_ret;                                                     \
	})

/* Pseudo-random numbers, the same for the same seed (splitmix64). */
static uint64_t next(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
	z = (z ^ z >> 27) * 0x94d049bb133111eb;
	return z ^ z >> 31;
}

static uint64_t below(uint64_t *state, uint64_t limit)
{
	return next(state) % limit;
}

/*
 * The data of a round: any two of 256 successive rounds differ in each byte, and data
 * at another offset looks different.
 */
static unsigned char pattern[MAX_SIZE];

static void init_pattern(void)
{
	uint64_t state = 1;

	for (size_t i = 0; i < MAX_SIZE; i++)
		pattern[i] = next(&state);
}

static void fill(unsigned char *buf, size_t size, unsigned char round)
{
	for (size_t i = 0; i < size; i++)
		buf[i] = pattern[i] + round;
}

/* Counts the bytes that are not those of the round. */
static uint64_t wrong_bytes(const unsigned char *buf, size_t size, unsigned char round)
{
	uint64_t wrong = 0;

	for (size_t i = 0; i < size; i++)
		wrong += buf[i] != (unsigned char)(pattern[i] + round);
	return wrong;
}

/*
 * Says what is wrong with a transfer. Whole pages with the data of an earlier round are
 * stale. That of round + 128 was there before: nothing has arrived. Anything else has many
 * runs. Not for rows, which would be torn.
 */
static bool explains;

static void explain(const unsigned char *buf, size_t size, uint64_t round)
{
	size_t first = size, last = 0, runs = 0;
	unsigned char data = 0;

	if (!explains)
		return;
	for (size_t i = 0; i < size; i++) {
		unsigned char seen = buf[i] - pattern[i];

		if (seen == (unsigned char)round)
			continue;
		if (first == size)
			first = i;
		runs += first == i || last + 1 != i || seen != data;
		last = i;
		data = seen;
	}
	printf("# wrong: round %lu, %zu bytes received at %p: from %zu to %zu, %zu runs, the last of round %u modulo 256\n",
	       round, size, buf, first, last, runs, data);
}

/* Transfers. Rank 1 does what the requests of rank 0 say. */

enum direction { SEND, RECEIVE, END };
static const char *const direction_names[] = { "send", "receive" };

enum tag { REQUEST, DATA, ANSWER };

struct request {
	uint32_t direction;
	uint32_t size;
	uint64_t round;
};

struct peer {
	MPI_Comm comm;
	uint64_t round;
	uint64_t bytes;
	uint64_t wrong;
};

static void request(struct peer *peer, enum direction direction, size_t size)
{
	struct request request = { direction, size, ++peer->round };

	MPI_Send(&request, sizeof(request), MPI_BYTE, 1, REQUEST, peer->comm);
}

/* Fills and sends the buffer, or receives into it, and returns how many bytes were wrong. */
static uint64_t transfer(struct peer *peer, enum direction direction, unsigned char *buf,
			 size_t size)
{
	uint64_t wrong;

	request(peer, direction, size);
	if (direction == SEND) {
		fill(buf, size, peer->round);
		MPI_Send(buf, size, MPI_BYTE, 1, DATA, peer->comm);
		MPI_Recv(&wrong, 1, MPI_UINT64_T, 1, ANSWER, peer->comm, MPI_STATUS_IGNORE);
	} else {
		fill(buf, size, peer->round + 128);
		MPI_Recv(buf, size, MPI_BYTE, 1, DATA, peer->comm, MPI_STATUS_IGNORE);
		wrong = wrong_bytes(buf, size, peer->round);
		if (wrong && !peer->wrong)
			explain(buf, size, peer->round);
	}
	peer->bytes += size;
	peer->wrong += wrong;
	return wrong;
}

static void serve(MPI_Comm comm)
{
	bool explained = false;
	unsigned char *buf = CHECK(mmap(NULL, MAX_SIZE, PROT_READ | PROT_WRITE,
					MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));

	for (;;) {
		struct request r;
		uint64_t wrong;

		MPI_Recv(&r, sizeof(r), MPI_BYTE, 0, REQUEST, comm, MPI_STATUS_IGNORE);
		if (r.direction == END)
			return;
		if (r.direction == SEND) {
			fill(buf, r.size, r.round + 128);
			MPI_Recv(buf, r.size, MPI_BYTE, 0, DATA, comm, MPI_STATUS_IGNORE);
			wrong = wrong_bytes(buf, r.size, r.round);
			if (wrong && !explained) {
				explain(buf, r.size, r.round);
				explained = true;
			}
			MPI_Send(&wrong, 1, MPI_UINT64_T, 0, ANSWER, comm);
		} else {
			fill(buf, r.size, r.round);
			MPI_Send(buf, r.size, MPI_BYTE, 0, DATA, comm);
		}
	}
}

/*
 * Buffers. They are not unmapped: a later one must not get the address of an earlier one.
 * They are below all addresses that the kernel chooses. So nothing that another thread maps
 * gets into the hole that some changes leave for a moment.
 */

enum kind { ANON, SHARED, PLUGIN };

struct buffer {
	enum kind kind;
	unsigned char *addr;
	size_t size;
	int fd;	      /* SHARED: of twice the size, so that other pages can be mapped */
	void *handle; /* PLUGIN */
	size_t offset;
};

static char plugin_path[4096];

static void load(struct buffer *b)
{
	b->handle = dlopen(plugin_path, RTLD_NOW | RTLD_LOCAL);
	if (!b->handle) {
		fprintf(stderr, "stale: %s\n", dlerror());
		die("dlopen");
	}
	b->addr = (unsigned char *)dlsym(b->handle, "plugin_buffer") + b->offset;
}

static void *map(size_t size, int flags, int fd)
{
	static _Atomic uintptr_t end = (uintptr_t)64 << 30;
	void *addr = (void *)atomic_fetch_add(&end, size);

	return CHECK(mmap(addr, size, PROT_READ | PROT_WRITE, flags | MAP_FIXED_NOREPLACE, fd, 0));
}

static void create(struct buffer *b, enum kind kind, size_t size)
{
	static size_t used; /* Each has its own part of the plug-in's memory. */

	*b = (struct buffer){ .kind = kind, .size = size, .fd = -1 };
	switch (kind) {
	case ANON:
		b->addr = map(size, MAP_PRIVATE | MAP_ANONYMOUS, -1);
		break;
	case SHARED:
		b->fd = CHECK(memfd_create("buffer", MFD_CLOEXEC));
		CHECK(ftruncate(b->fd, 2 * size));
		b->addr = map(size, MAP_SHARED, b->fd);
		break;
	case PLUGIN:
		b->offset = used;
		used += size;
		if (used > PLUGIN_SIZE)
			die("the plug-in has too little memory");
		load(b);
		break;
	}
}

static void release(struct buffer *b)
{
	if (b->kind == SHARED)
		close(b->fd);
	if (b->kind == PLUGIN)
		dlclose(b->handle);
}

/*
 * Changes of the mapping of a part of a buffer, or of all of it where there is no other
 * way. They return -1 and set errno if they fail.
 */

static int raw_munmap_mmap(struct buffer *b, size_t offset, size_t size)
{
	bool shared = b->kind == SHARED;

	if (syscall(SYS_munmap, b->addr + offset, size))
		return -1;
	return (unsigned char *)syscall(SYS_mmap, b->addr + offset, size, PROT_READ | PROT_WRITE,
					MAP_FIXED | (shared ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS),
					b->fd, shared ? b->size + offset : 0) == b->addr + offset ? 0 : -1;
}

static int libc_munmap_mmap(struct buffer *b, size_t offset, size_t size)
{
	if (munmap(b->addr + offset, size))
		return -1;
	return mmap(b->addr + offset, size, PROT_READ | PROT_WRITE,
		    MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) == MAP_FAILED ? -1 : 0;
}

static int raw_dontneed(struct buffer *b, size_t offset, size_t size)
{
	return syscall(SYS_madvise, b->addr + offset, size, MADV_DONTNEED);
}

static int libc_dontneed(struct buffer *b, size_t offset, size_t size)
{
	return madvise(b->addr + offset, size, MADV_DONTNEED);
}

static int dontneed_locked(struct buffer *b, size_t offset, size_t size)
{
	return madvise(b->addr + offset, size, MADV_DONTNEED_LOCKED);
}

static int process_dontneed(struct buffer *b, size_t offset, size_t size)
{
	struct iovec range = { b->addr + offset, size };
	int pidfd = CHECK((int)syscall(SYS_pidfd_open, getpid(), 0));
	ssize_t done = syscall(SYS_process_madvise, pidfd, &range, 1, MADV_DONTNEED, 0);

	close(pidfd);
	return done == (ssize_t)size ? 0 : -1;
}

static int uring_dontneed(struct buffer *b, size_t offset, size_t size)
{
	struct io_uring_cqe *cqe;
	struct io_uring ring;
	int ret = io_uring_queue_init(1, &ring, 0);

	if (ret)
		goto out;
	io_uring_prep_madvise(io_uring_get_sqe(&ring), b->addr + offset, size, MADV_DONTNEED);
	ret = io_uring_submit_and_wait(&ring, 1);
	if (ret == 1) {
		ret = io_uring_wait_cqe(&ring, &cqe);
		if (!ret)
			ret = cqe->res;
	}
	io_uring_queue_exit(&ring);
out:
	errno = -ret;
	return ret ? -1 : 0;
}

static int guard(struct buffer *b, size_t offset, size_t size)
{
	if (madvise(b->addr + offset, size, MADV_GUARD_INSTALL))
		return -1;
	return madvise(b->addr + offset, size, MADV_GUARD_REMOVE);
}

static int mremap_over(struct buffer *b, size_t offset, size_t size)
{
	void *other = CHECK(mmap(NULL, size, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0));
	unsigned char *new = mremap(other, size, size, MREMAP_MAYMOVE | MREMAP_FIXED,
				    b->addr + offset);

	if (new == MAP_FAILED || new == b->addr + offset)
		return new == MAP_FAILED ? -1 : 0;
	/* The hook of UCX before 1.15 loses the last argument. */
	syscall(SYS_munmap, new, size);
	errno = EFAULT;
	return -1;
}

static int truncate_self(struct buffer *b, size_t, size_t)
{
	return ftruncate(b->fd, 0) ?: ftruncate(b->fd, 2 * b->size);
}

static int truncate_other(struct buffer *b, size_t, size_t)
{
	extern char **environ;
	int status;
	pid_t pid;

	for (size_t size = 0; size <= 2 * b->size; size += 2 * b->size) {
		char file[64], bytes[32];
		char *argv[] = { "truncate", "-s", bytes, file, NULL };

		snprintf(file, sizeof(file), "/proc/%d/fd/%d", getpid(), b->fd);
		snprintf(bytes, sizeof(bytes), "%zu", size);
		errno = posix_spawnp(&pid, argv[0], NULL, NULL, argv, environ);
		if (errno || waitpid(pid, &status, 0) != pid)
			return -1;
		if (status) {
			errno = EIO;
			return -1;
		}
	}
	return 0;
}

static int punch_hole(struct buffer *b, size_t offset, size_t size)
{
	int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	return fallocate(b->fd, mode, offset, size) ?: fallocate(b->fd, mode, b->size + offset, size);
}

static int remap_pages(struct buffer *b, size_t offset, size_t size)
{
	/* Pages from the second half of the file. Later ones find them mapped already. */
	return remap_file_pages(b->addr + offset, size, 0, (b->size + offset) / PAGE, 0);
}

static int reload(struct buffer *b, size_t, size_t)
{
	unsigned char *before = b->addr;

	if (dlclose(b->handle))
		return -1;
	load(b);
	if (b->addr == before)
		return 0;
	errno = EADDRNOTAVAIL;
	return -1;
}

static const struct change {
	const char *name;
	enum kind kind;
	int (*make)(struct buffer *b, size_t offset, size_t size);
	bool soak; /* possible again and again, for any part, in any thread */
	const char *text;
} changes[] = {
	{ "libc_munmap_mmap", ANON, libc_munmap_mmap, true, "munmap() and mmap() of libc" },
	{ "libc_madv_dontneed", ANON, libc_dontneed, true, "madvise(MADV_DONTNEED) of libc" },
	{ "munmap_mmap", ANON, raw_munmap_mmap, true, "munmap and mmap, raw system calls" },
	{ "madv_dontneed", ANON, raw_dontneed, true, "madvise(MADV_DONTNEED), raw system call" },
	{ "process_madvise", ANON, process_dontneed, true, "process_madvise(MADV_DONTNEED)" },
	{ "io_uring_madvise", ANON, uring_dontneed, true, "io_uring: MADV_DONTNEED" },
	{ "madv_dontneed_locked", ANON, dontneed_locked, true, "madvise(MADV_DONTNEED_LOCKED)" },
	{ "madv_guard_install", ANON, guard, true, "madvise(MADV_GUARD_INSTALL), then REMOVE" },
	{ "mremap_over", ANON, mremap_over, true, "mremap(MREMAP_FIXED) of another mapping onto it" },
	{ "ftruncate", SHARED, truncate_self, true, "ftruncate() to 0 and back, shared memory" },
	{ "ftruncate_other", SHARED, truncate_other, false, "the same by another process" },
	{ "punch_hole", SHARED, punch_hole, true, "fallocate(FALLOC_FL_PUNCH_HOLE)" },
	{ "remap_file_pages", SHARED, remap_pages, false, "remap_file_pages()" },
	{ "dlclose_dlopen", PLUGIN, reload, false, "dlclose() and dlopen() of a plug-in" },
};
#define CHANGES (sizeof(changes) / sizeof(changes[0]))

/* The child unmaps the buffer, its own, and becomes another program. */
static void fork_exec(const struct buffer *b)
{
	pid_t pid = CHECK(fork());
	int status;

	if (!pid) {
		munmap(b->addr, b->size);
		execlp("true", "true", NULL);
		_exit(1);
	}
	if (waitpid(pid, &status, 0) != pid || status)
		die("the child");
}

static void row(struct peer *peer, const struct change *change, enum direction direction,
		size_t size, bool forks)
{
	struct buffer b;
	uint64_t wrong;

	printf("%s %s %zuKiB ", change->name, direction_names[direction], size / 1024);
	create(&b, change->kind, size);
	wrong = transfer(peer, direction, b.addr, size);
	if (forks) {
		fork_exec(&b);
		wrong += transfer(peer, direction, b.addr, size);
	}
	if (wrong) {
		printf("broken: %lu bytes before the change\n", wrong);
	} else if (change->make(&b, 0, size)) {
		/* This is what the hook made of the call. */
		printf("%s: %s\n", errno == EFAULT ? "wrong" : "skipped",
		       errno == EFAULT ? "mapped at another address" : strerror(errno));
	} else {
		wrong = transfer(peer, direction, b.addr, size);
		/* Only afterwards: UCX drops its cache in fork(). */
		if (forks) {
			if (change->make(&b, 0, size))
				die(change->name);
			fork_exec(&b);
			wrong += transfer(peer, direction, b.addr, size);
		}
		if (wrong)
			printf("wrong: %lu of %zu bytes\n", wrong, forks ? 2 * size : size);
		else
			printf("right\n");
	}
	fflush(stdout);
	release(&b);
}

static bool listed(const char *list, const char *name)
{
	size_t length = strlen(name);

	if (!strcmp(list, "all"))
		return true;
	for (; list; list = strchr(list, ','), list += !!list)
		if (!strncmp(list, name, length) && (!list[length] || list[length] == ','))
			return true;
	return false;
}

static void rows(struct peer *peer, const char *names, const char *sizes, bool forks)
{
	for (const char *s = sizes; s; s = strchr(s, ','), s += !!s) {
		size_t size = strtoul(s, NULL, 10) * 1024;

		if (!size || size > MAX_SIZE)
			die("the size");
		for (size_t i = 0; i < CHANGES; i++)
			for (enum direction d = SEND; d <= RECEIVE && listed(names, changes[i].name); d++)
				row(peer, &changes[i], d, size, forks);
	}
}

/* A random change of a part of a random buffer, and a transfer that touches it. */
static void step(struct peer *peer, struct buffer *buffers, uint64_t *random)
{
	const struct change *change;
	enum direction direction;
	size_t page, pages, offset, size;
	struct buffer *b;
	bool change_it;
	uint64_t wrong;

	do {
		change = &changes[below(random, CHANGES)];
	} while (!change->soak);
	b = &buffers[2 * (change->kind == SHARED) + below(random, 2)];
	page = below(random, b->size / PAGE);
	pages = 1 + below(random, b->size / PAGE - page);
	/* Every fourth time nothing changes, and the cache may be right. */
	change_it = below(random, 4);
	if (change_it && change->make(b, page * PAGE, pages * PAGE) && errno != EFAULT)
		die(change->name);

	direction = below(random, 2);
	offset = below(random, b->size - 1);
	size = 1 + below(random, b->size - offset);
	wrong = peer->wrong;
	if (transfer(peer, direction, b->addr + offset, size) && !wrong)
		printf("# wrong: round %lu, %s of %zu bytes at %p after %s of %zu bytes at %p\n",
		       peer->round, direction_names[direction], size, b->addr + offset,
		       change_it ? change->name : "no change", pages * PAGE, b->addr + page * PAGE);
}

static void create_all(struct buffer *buffers)
{
	create(&buffers[0], ANON, 128 * 1024);
	create(&buffers[1], ANON, MAX_SIZE);
	create(&buffers[2], SHARED, 128 * 1024);
	create(&buffers[3], SHARED, MAX_SIZE);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void soak(struct peer *peer, double seconds, uint64_t seed, uint64_t steps)
{
	double begin = now();
	struct buffer buffers[4];
	uint64_t random = seed, n = 0, first = 0;

	printf("# seed %lu\n", seed);
	fflush(stdout);
	create_all(buffers);
	while (now() < begin + seconds && n < steps) {
		n++;
		step(peer, buffers, &random);
		if (peer->wrong && !first)
			first = n;
	}
	printf("soak - - %s: %lu of %lu bytes in %lu steps, seed %lu", peer->wrong ? "wrong" : "right",
	       peer->wrong, peer->bytes, n, seed);
	if (first)
		printf(", first in step %lu", first);
	printf("\n");
}

struct thread {
	pthread_t thread;
	struct peer peer;
	unsigned long rounds;
	uint64_t random;
};

static void *thread_main(void *arg)
{
	struct thread *t = arg;
	struct buffer buffers[4];

	create_all(buffers);
	for (unsigned long i = 0; i < t->rounds; i++)
		step(&t->peer, buffers, &t->random);
	request(&t->peer, END, 0);
	return NULL;
}

static void *thread_serve(void *arg)
{
	struct thread *t = arg;

	serve(t->peer.comm);
	return NULL;
}

static void threads(int rank, unsigned long rounds, uint64_t seed)
{
	struct thread t[THREADS];
	uint64_t wrong = 0, bytes = 0;

	for (int i = 0; i < THREADS; i++) {
		t[i] = (struct thread){ .rounds = rounds, .random = seed + i };
		MPI_Comm_dup(MPI_COMM_WORLD, &t[i].peer.comm);
	}
	for (int i = 0; i < THREADS; i++)
		if (pthread_create(&t[i].thread, NULL, rank ? thread_serve : thread_main, &t[i]))
			die("pthread_create");
	for (int i = 0; i < THREADS; i++) {
		pthread_join(t[i].thread, NULL);
		wrong += t[i].peer.wrong;
		bytes += t[i].peer.bytes;
	}
	if (!rank)
		printf("threads - - %s: %lu of %lu bytes, %d threads, %lu transfers each, seed %lu\n",
		       wrong ? "wrong" : "right", wrong, bytes, THREADS, rounds, seed);
}

/*
 * What a transfer costs. Rank 0 sends from a few buffers in turn, and changes the mapping
 * of one before some of the transfers. No message besides, so that little is counted that
 * has nothing to do with it.
 */

#define COST_SIZE 20480 /* the least that neither library has to copy */
#define COST_WORDS (COST_SIZE / sizeof(uint64_t))
#define COST_BUFFERS 7 /* odd, so that each is changed in its turn */
#define COST_TRANSFERS (COST_BUFFERS * 64)
#define COST_SAMPLES 3

static const struct trace {
	const char *name;
	int uses; /* transfers for each change */
	int (*change)(struct buffer *b, size_t offset, size_t size);
} traces[] = {
	{ "reuse-heavy", 64, libc_munmap_mmap },
	{ "churn-heavy", 8, libc_munmap_mmap },
	{ "raw", 8, raw_munmap_mmap }, /* which no hook in libc sees */
};
#define TRACES (sizeof(traces) / sizeof(traces[0]))

/* Returns how many transfers were wrong. Each has a number, which all of its data is. */
static uint64_t cost_send(const struct trace *trace, uint64_t *number)
{
	static struct buffer buffers[COST_BUFFERS];
	uint64_t wrong;

	for (int i = 0; i < COST_TRANSFERS; i++) {
		struct buffer *b = &buffers[i % COST_BUFFERS];

		if (!b->addr)
			create(b, ANON, COST_SIZE);
		else if (i % trace->uses == 0)
			CHECK(trace->change(b, 0, b->size));
		++*number;
		for (size_t word = 0; word < COST_WORDS; word++)
			((uint64_t *)b->addr)[word] = *number;
		MPI_Send(b->addr, b->size, MPI_BYTE, 1, DATA, MPI_COMM_WORLD);
	}
	MPI_Recv(&wrong, 1, MPI_UINT64_T, 1, ANSWER, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
	return wrong;
}

static void cost_receive(uint64_t *number)
{
	static struct buffer buffer;
	uint64_t wrong = 0;

	if (!buffer.addr)
		create(&buffer, ANON, COST_SIZE);
	for (int i = 0; i < COST_TRANSFERS; i++) {
		uint64_t different = 0;

		MPI_Recv(buffer.addr, buffer.size, MPI_BYTE, 0, DATA, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
		++*number;
		for (size_t word = 0; word < COST_WORDS; word++)
			different |= ((uint64_t *)buffer.addr)[word] ^ *number;
		wrong += !!different;
	}
	MPI_Send(&wrong, 1, MPI_UINT64_T, 0, ANSWER, MPI_COMM_WORLD);
}

/*
 * Counts the system calls of all processes, but for sched_yield(), which a rank that waits
 * calls again and again.
 */
static int open_calls(void)
{
	struct perf_event_attr attr = { .type = PERF_TYPE_TRACEPOINT, .size = sizeof(attr) };
	FILE *id = fopen("/sys/kernel/tracing/events/raw_syscalls/sys_enter/id", "r");
	char filter[32];
	int fd;

	if (!id || fscanf(id, "%llu", &attr.config) != 1)
		die("the tracepoint of system calls");
	fclose(id);
	fd = CHECK((int)syscall(SYS_perf_event_open, &attr, -1, 0, -1, PERF_FLAG_FD_CLOEXEC));
	snprintf(filter, sizeof(filter), "id != %d", SYS_sched_yield);
	CHECK(ioctl(fd, PERF_EVENT_IOC_SET_FILTER, filter));
	return fd;
}

static uint64_t read_calls(int fd)
{
	uint64_t calls = 0;

	CHECK(read(fd, &calls, sizeof(calls)));
	return calls;
}

static int by_value(const void *a, const void *b)
{
	double x = *(const double *)a, y = *(const double *)b;

	return (x > y) - (x < y);
}

/*
 * A line for each trace: the instructions of a transfer, by whatever ran on the CPU; its
 * system calls; the wrong transfers, of how many. To count system calls takes instructions,
 * so they have a sample of their own.
 */
static void cost(int rank)
{
	uint64_t number = 0;

	for (size_t t = 0; t < TRACES; t++) {
		double samples[COST_SAMPLES];
		uint64_t start, wrong;
		int fd;

		if (rank) {
			for (int i = 0; i < 1 + COST_SAMPLES + 1; i++)
				cost_receive(&number);
			continue;
		}
		wrong = cost_send(&traces[t], &number); /* the warm-up */
		for (int i = 0; i < COST_SAMPLES; i++) {
			start = __rdtsc();
			wrong += cost_send(&traces[t], &number);
			samples[i] = (double)(__rdtsc() - start) / COST_TRANSFERS;
		}
		qsort(samples, COST_SAMPLES, sizeof(samples[0]), by_value);
		fd = open_calls();
		start = read_calls(fd);
		wrong += cost_send(&traces[t], &number);
		printf("cost %s %f %f %lu %d\n", traces[t].name, samples[COST_SAMPLES / 2],
		       (double)(read_calls(fd) - start) / COST_TRANSFERS, wrong,
		       COST_TRANSFERS * (1 + COST_SAMPLES + 1));
		close(fd);
	}
}

/* Which libraries the rank runs with: nothing else tells whether they are the right ones. */
static int print_library(struct dl_phdr_info *info, size_t, void *)
{
	static const char *const names[] = { "libibverbs.so", "libucs.so", "libfabric.so" };

	for (size_t i = 0; i < 3; i++)
		if (strstr(info->dlpi_name, names[i]))
			printf("# library %s\n", info->dlpi_name);
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	struct peer peer = { .comm = MPI_COMM_WORLD };
	bool multiple = !strcmp(mode, "threads") && argc == 4;
	int rank, size, provided;

	if (!strcmp(mode, "list") && argc == 2) {
		for (size_t i = 0; i < CHANGES; i++)
			printf("%s\t%s\n", changes[i].name, changes[i].text);
		return 0;
	}
	/* The plug-in is in the folder of the program. */
	snprintf(plugin_path, sizeof(plugin_path), "%.*splugin.so",
		 strrchr(argv[0], '/') ? (int)(strrchr(argv[0], '/') + 1 - argv[0]) : 0, argv[0]);
	init_pattern();
	explains = !strcmp(mode, "threads") || !strcmp(mode, "soak");
	MPI_Init_thread(&argc, &argv, multiple ? MPI_THREAD_MULTIPLE : MPI_THREAD_SINGLE, &provided);
	MPI_Comm_rank(MPI_COMM_WORLD, &rank);
	MPI_Comm_size(MPI_COMM_WORLD, &size);
	if (size != 2)
		die("needs two ranks");
	if (!rank)
		dl_iterate_phdr(print_library, NULL);
	if (multiple && provided < MPI_THREAD_MULTIPLE) {
		if (!rank)
			printf("threads - - skipped: no MPI_THREAD_MULTIPLE\n");
	} else if (multiple) {
		threads(rank, strtoul(argv[2], NULL, 10), strtoull(argv[3], NULL, 10));
	} else if (!strcmp(mode, "cost") && argc == 2) {
		cost(rank);
	} else if (rank) {
		serve(MPI_COMM_WORLD);
	} else {
		if ((!strcmp(mode, "rows") || !strcmp(mode, "fork")) && argc == 4)
			rows(&peer, argv[2], argv[3], !strcmp(mode, "fork"));
		else if (!strcmp(mode, "soak") && argc >= 4)
			soak(&peer, strtod(argv[2], NULL), strtoull(argv[3], NULL, 10),
			     argc > 4 ? strtoull(argv[4], NULL, 10) : UINT64_MAX);
		else
			die("see the usage at the top of stale.c");
		request(&peer, END, 0);
	}
	if (!rank)
		printf("# end\n");
	MPI_Finalize();
	return 0;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * What MMU notification reports for each change of the mapping under an MR, by
 * kind of memory.
 *
 * Each test is a row. It also says what it saw, in lines of this form:
 *
 *   # row <row> / <memory>: <reasons or none>[, <n> hits, units <a>-<b>][ (<error>)]
 *
 * Rows of which the kernel makes no promise, because what fires depends on more
 * than the call, are recorded and not judged, except that an event must still be
 * about the MR and bump the counter. These are known false alarms, or may be.
 *
 * Not here, because nothing makes them happen at will: a mremap() that fails
 * after it began to move; khugepaged losing a race; the OOM reaper, which does
 * what process_mrelease() does; reclaim that finds a page in the swap cache.
 */
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <linux/memfd.h>
#include <linux/mempolicy.h>
#include <linux/mman.h>
#include <linux/perf_event.h>
#include <linux/userfaultfd.h>
#include <sched.h>
#include <signal.h>
#include <sys/ipc.h>
#include <sys/ptrace.h>
#include <sys/shm.h>
#include <sys/socket.h>
#include <time.h>

#include "uverbs_mmu_notify.h"

#include <lib/test_hmm_uapi.h>

#define HUGE_2M		(2UL << 20)

/* The units of a mapping are pages, or huge pages; the MR is 1 to 3 of 0 to 4. */
#define UNITS	5
#define FROM	1
#define TO	4

struct memory {
	const char *name;
	bool huge;
	bool read_only;
	int flags;	/* of mmap() */
	enum { NO_FILE, MEMFD, DISK } file;
	unsigned int memfd_flags;
};

static const struct memory anon = {
	.name = "anon", .flags = MAP_PRIVATE | MAP_ANONYMOUS,
};

static const struct memory shared_anon = {
	.name = "shared_anon", .flags = MAP_SHARED | MAP_ANONYMOUS,
};

static const struct memory memfd = {
	.name = "memfd", .flags = MAP_SHARED, .file = MEMFD,
};

static const struct memory memfd_private = {
	.name = "memfd_private", .flags = MAP_PRIVATE, .file = MEMFD,
};

static const struct memory file_private = {
	.name = "file_private", .flags = MAP_PRIVATE, .file = DISK,
};

/* A shared and writable one is dirty-tracked, and cannot be pinned for long. */
static const struct memory file_ro = {
	.name = "file_ro", .flags = MAP_SHARED, .file = DISK, .read_only = true,
};

static const struct memory hugetlb = {
	.name = "hugetlb", .huge = true,
	.flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_HUGETLB | MAP_HUGE_2MB,
};

static const struct memory hugetlb_shared = {
	.name = "hugetlb_shared", .huge = true, .flags = MAP_SHARED,
	.file = MEMFD, .memfd_flags = MFD_HUGETLB | MFD_HUGE_2MB,
};

static const struct memory thp = {
	.name = "thp", .huge = true, .flags = MAP_PRIVATE | MAP_ANONYMOUS,
};

struct row {
	const struct memory *memory;
	struct notify notify;
	size_t unit;
	char *map;
	int fd;		/* of the file that is mapped, or -1 */
	struct mr mr;
	int events;	/* that were read */
	/* What was recorded last */
	unsigned int reasons;
	unsigned long long hits;
	uint64_t start, end;
};

#define AT(n)		(row->map + (long)(n) * (long)row->unit)
#define LEN(n)		((n) * row->unit)
#define COOKIE		7

static bool is_hugetlb(const struct row *row)
{
	return row->memory == &hugetlb || row->memory == &hugetlb_shared;
}

/* Read what was reported since the last time, check that it is sane, print it. */
static void record(struct __test_metadata *_metadata, struct row *row,
		   const char *name, int err)
{
	uint64_t now = generation(&row->notify);
	struct ib_uverbs_mmu_notify_event e[2];
	int events = events_read(&row->notify, e, 2);

	row->hits = now - row->notify.seen;
	row->notify.seen = now;
	row->reasons = 0;
	printf("# row %s / %s: ", name, row->memory->name);
	if (events == -EAGAIN) {
		EXPECT_EQ(0, row->hits);
		printf("none");
	} else {
		ASSERT_EQ(1, events);
		row->events++;
		EXPECT_LT(0, row->hits);
		EXPECT_EQ(COOKIE, e->cookie);
		EXPECT_EQ(now, e->generation);
		EXPECT_LE(row->mr.addr, e->start);
		EXPECT_LT(e->start, e->end);
		EXPECT_LE(e->end, row->mr.addr + row->mr.length);
		EXPECT_NE(0, e->reasons);
		EXPECT_EQ(0, e->reasons & ~(UNMAPPED | MAYBE_STALE));
		row->reasons = e->reasons;
		row->start = e->start;
		row->end = e->end;
		printf("%s%s%s, %llu hits, units %.2f-%.2f",
		       e->reasons & UNMAPPED ? "UNMAPPED" : "",
		       e->reasons == (UNMAPPED | MAYBE_STALE) ? "|" : "",
		       e->reasons & MAYBE_STALE ? "MAYBE_STALE" : "",
		       row->hits,
		       (double)(e->start - (uintptr_t)row->map) / row->unit,
		       (double)(e->end - (uintptr_t)row->map) / row->unit);
	}
	printf(err ? " (%s)\n" : "\n", strerror(err));
	fflush(stdout);
}

/* Record a row that is not judged. @ret is the call's, and may say it failed. */
#define RECORD(ret) do {						\
	int _err = (ret) < 0 ? errno : 0;				\
									\
	record(_metadata, row, _metadata->name, _err);			\
} while (0)

#define EXPECT_SILENT(name) do {					\
	record(_metadata, row, name, 0);				\
	EXPECT_EQ(0, row->reasons);					\
	EXPECT_EQ(0, row->hits);					\
} while (0)

#define SILENT()	EXPECT_SILENT(_metadata->name)

#define EXPECT_REPORTED(name, _reasons, from, to) do {			\
	record(_metadata, row, name, 0);				\
	EXPECT_EQ(_reasons, row->reasons);				\
	EXPECT_EQ((uintptr_t)AT(from), row->start);			\
	EXPECT_EQ((uintptr_t)AT(to), row->end);				\
} while (0)

#define REPORTED(reasons, from, to) \
	EXPECT_REPORTED(_metadata->name, reasons, from, to)

static void touch(const struct row *row, char *addr, int units)
{
	size_t step = getpagesize(), i;

	for (i = 0; i < LEN(units); i += step) {
		if (row->memory->read_only)
			__atomic_load_n(addr + i, __ATOMIC_RELAXED);
		else
			__atomic_fetch_add(addr + i, 1, __ATOMIC_RELAXED);
	}
}

/* Write back, so that nothing but the test changes the file. */
static int disk_file(size_t len)
{
	const char *dir = getenv("TEST_DIR");
	char path[4096], *fill;
	int fd;

	if (!dir)
		return -1;
	snprintf(path, sizeof(path), "%s/uverbs_mmu_notify_XXXXXX", dir);
	fd = mkstemp(path);
	if (fd < 0)
		return -1;
	unlink(path);
	fill = malloc(len);
	memset(fill, 0x90, len);	/* x86 can execute this, see uprobe */
	if (pwrite(fd, fill, len, 0) != (ssize_t)len || fsync(fd)) {
		close(fd);
		fd = -1;
	}
	free(fill);
	return fd;
}

/* How many bytes there are in huge pages, of the page table's kind. */
static long long huge_bytes(char *addr, size_t len)
{
	struct page_region regions[UNITS * 2];
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.start = (uintptr_t)addr,
		.end = (uintptr_t)addr + len,
		.vec = (uintptr_t)regions,
		.vec_len = ARRAY_SIZE(regions),
		.category_mask = PAGE_IS_HUGE,
		.return_mask = PAGE_IS_HUGE,
	};
	int fd = open("/proc/self/pagemap", O_RDONLY);
	int i, n = ioctl(fd, PAGEMAP_SCAN, &arg);
	long long bytes = 0;

	close(fd);
	for (i = 0; i < n; i++)
		bytes += regions[i].end - regions[i].start;
	return n < 0 ? -1 : bytes;
}

/* Room for @units, aligned, with as much room behind; nothing is mapped there. */
static char *find_room(const struct row *row, int units)
{
	size_t len = LEN(2 * units) + HUGE_2M;
	char *room = mmap(NULL, len, PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	if (room == MAP_FAILED)
		return NULL;
	munmap(room, len);
	return (char *)(((uintptr_t)room + HUGE_2M - 1) & ~(HUGE_2M - 1));
}

static void *map_memory(const struct row *row, char *addr, int units)
{
	const struct memory *memory = row->memory;
	int prot = PROT_READ | (memory->read_only ? 0 : PROT_WRITE);
	char *map = mmap(addr, LEN(units), prot,
			 memory->flags | MAP_FIXED_NOREPLACE, row->fd, 0);

	if (map == MAP_FAILED)
		return NULL;
	if (memory == &thp)
		madvise(map, LEN(units), MADV_HUGEPAGE);
	else
		madvise(map, LEN(units), MADV_NOHUGEPAGE);
	return map;
}

static void row_watch(struct __test_metadata *_metadata, struct row *row,
		      void *addr, size_t len)
{
	struct ib_uverbs_mmu_notify_event e;

	row->mr = mr_of(&row->notify, addr, len);
	if (row->memory->read_only)
		row->mr.access = MR_READ;
	ASSERT_EQ(0, mr_watch(row->notify.ctx, &row->mr, row->notify.queue,
			      COOKIE));
	/* The pin itself may have replaced pages. */
	if (events_read(&row->notify, &e, 1) == 1)
		row->events++;
	row->notify.seen = generation(&row->notify);
}

/* The line that begins with @key in @path, after the key, as a number. */
static long long file_number(const char *path, const char *key)
{
	char line[256];
	long long value = -1;
	FILE *f = fopen(path, "r");

	if (!f)
		return -1;
	while (value < 0 && fgets(line, sizeof(line), f)) {
		if (strncmp(line, key, strlen(key)))
			continue;
		value = atoll(line + strlen(key) + strspn(line + strlen(key), " \t:"));
	}
	fclose(f);
	return value;
}

#define FREE_HUGEPAGES	"/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages"

static void row_map(struct __test_metadata *_metadata, struct row *row,
		    const struct memory *memory)
{
	row->memory = memory;
	row->unit = memory->huge ? HUGE_2M : getpagesize();
	row->fd = -1;
	if (memory->file == MEMFD) {
		row->fd = memfd_create("uverbs_mmu_notify", memory->memfd_flags);
		if (row->fd < 0)
			SKIP(return, "no such memfd: %s", strerror(errno));
		ASSERT_EQ(0, ftruncate(row->fd, LEN(UNITS)));
	} else if (memory->file == DISK) {
		row->fd = disk_file(LEN(UNITS));
		if (row->fd < 0)
			SKIP(return, "no file system in TEST_DIR");
	}
	/* Children copy what is pinned, and have no reserve to do so. */
	if (is_hugetlb(row) && file_number(FREE_HUGEPAGES, "") < 3 * UNITS)
		SKIP(return, "too few huge pages");
	row->map = find_room(row, 2 * UNITS);
	ASSERT_NE(NULL, row->map);
	row->map = map_memory(row, row->map, UNITS);
	if (!row->map && is_hugetlb(row))
		SKIP(return, "no huge pages: %s", strerror(errno));
	ASSERT_NE(NULL, row->map);
	touch(row, row->map, UNITS);
	if (memory == &thp && huge_bytes(row->map, LEN(UNITS)) != LEN(UNITS))
		SKIP(return, "no transparent huge pages");
}

static void row_setup(struct __test_metadata *_metadata, struct row *row,
		      const struct memory *memory)
{
	notify_open(_metadata, &row->notify);
	row_map(_metadata, row, memory);
	if (!_metadata->exit_code)
		row_watch(_metadata, row, AT(FROM), LEN(TO - FROM));
}

static void row_teardown(struct __test_metadata *_metadata, struct row *row)
{
	if (row->mr.length)
		EXPECT_EQ(row->events, mr_destroy(row->notify.ctx, &row->mr));
	notify_close(&row->notify);
}

/*
 * A child that waits until it is told to go on, or until its parent is gone.
 */
struct child {
	pid_t pid;
	int go;
};

/* Returns true in the child. */
static bool child_start(struct __test_metadata *_metadata, struct child *child)
{
	int pipefd[2];
	char c;

	ASSERT_EQ(0, pipe2(pipefd, O_CLOEXEC));
	child->pid = fork();
	ASSERT_LE(0, child->pid);
	child->go = pipefd[1];
	if (child->pid) {
		close(pipefd[0]);
		return false;
	}
	close(pipefd[1]);
	if (read(pipefd[0], &c, 1) != 1)
		_exit(1);
	return true;
}

static int child_finish(struct child *child)
{
	if (write(child->go, "", 1) != 1)
		return -1;
	close(child->go);
	return child_wait(child->pid);
}

/*
 * Rows for all kinds of memory
 */
FIXTURE(all)
{
	struct row row;
};

FIXTURE_VARIANT(all)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(all, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(all, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(all, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(all, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(all, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(all, hugetlb) { .memory = &hugetlb };
FIXTURE_VARIANT_ADD(all, hugetlb_shared) { .memory = &hugetlb_shared };
FIXTURE_VARIANT_ADD(all, thp) { .memory = &thp };

FIXTURE_SETUP(all)
{
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(all)
{
	row_teardown(_metadata, &self->row);
}

TEST_F(all, munmap)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, munmap(AT(FROM), LEN(TO - FROM)));
	REPORTED(UNMAPPED, FROM, TO);
	EXPECT_EQ(1, row->hits);
}

TEST_F(all, munmap_parts)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, munmap(AT(0), LEN(1)));
	ASSERT_EQ(0, munmap(AT(4), LEN(1)));
	EXPECT_SILENT("munmap_neighbours");
	ASSERT_EQ(0, munmap(AT(2), LEN(1)));
	EXPECT_REPORTED("munmap_middle", UNMAPPED, 2, 3);
	ASSERT_EQ(0, munmap(AT(1), LEN(1)));
	EXPECT_REPORTED("munmap_head", UNMAPPED, 1, 2);
	ASSERT_EQ(0, munmap(AT(3), LEN(1)));
	EXPECT_REPORTED("munmap_tail", UNMAPPED, 3, 4);
}

TEST_F(all, munmap_beyond_both_ends)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, munmap(AT(0), LEN(UNITS)));
	REPORTED(UNMAPPED, FROM, TO);
	EXPECT_EQ(1, row->hits);
}

TEST_F(all, munmap_by_vfork_child)
{
	struct row *row = &self->row;
	pid_t child = vfork();

	if (!child)
		_exit(munmap(AT(2), LEN(2)) != 0);
	ASSERT_EQ(0, child_wait(child));
	REPORTED(UNMAPPED, 2, 4);
	EXPECT_EQ(1, row->hits);
}

TEST_F(all, mmap_over)
{
	struct row *row = &self->row;

	ASSERT_EQ(AT(2), mmap(AT(2), LEN(1), PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	REPORTED(UNMAPPED, 2, 3);
	EXPECT_EQ(1, row->hits);
}

/* Huge pages move with a CLEAR of their own. */
TEST_F(all, mremap_move)
{
	struct row *row = &self->row;
	char *to = AT(2 * UNITS);

	ASSERT_EQ(to, mremap(AT(2), LEN(2), LEN(2),
			     MREMAP_MAYMOVE | MREMAP_FIXED, to));
	REPORTED(is_hugetlb(row) ? UNMAPPED | MAYBE_STALE : UNMAPPED, 2, 4);
}

TEST_F(all, mremap_shrink)
{
	struct row *row = &self->row;

	ASSERT_EQ(AT(0), mremap(AT(0), LEN(UNITS), LEN(2), 0));
	REPORTED(UNMAPPED, 2, TO);
}

/* What moves is not watched, what it replaces is. */
TEST_F(all, mremap_over)
{
	struct row *row = &self->row;
	char *other = mmap(AT(2 * UNITS), LEN(1), PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE,
			   -1, 0);

	ASSERT_EQ(AT(2 * UNITS), other);
	touch(row, other, 1);
	ASSERT_EQ(AT(2), mremap(other, LEN(1), LEN(1),
				MREMAP_MAYMOVE | MREMAP_FIXED, AT(2)));
	REPORTED(UNMAPPED, 2, 3);
}

TEST_F(all, dontneed)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, madvise(AT(2), LEN(2), MADV_DONTNEED));
	REPORTED(MAYBE_STALE, 2, 4);
}

TEST_F(all, dontneed_locked)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, mlock(AT(0), LEN(UNITS)));
	ASSERT_EQ(0, madvise(AT(2), LEN(2), MADV_DONTNEED_LOCKED));
	REPORTED(MAYBE_STALE, 2, 4);
}

TEST_F(all, process_madvise)
{
	struct row *row = &self->row;
	struct iovec range = { .iov_base = AT(2), .iov_len = LEN(2) };
	int pidfd = syscall(__NR_pidfd_open, getpid(), 0);

	ASSERT_LE(0, pidfd);
	ASSERT_EQ(LEN(2), syscall(__NR_process_madvise, pidfd, &range, 1,
				  MADV_DONTNEED, 0)) {
		TH_LOG("%s", strerror(errno));
	}
	REPORTED(MAYBE_STALE, 2, 4);
}

/* One madvise() by io_uring, in a thread of the kernel's: 0 or -errno. */
static int uring_madvise(int ring, const struct io_uring_params *params,
			 void *addr, size_t len, int advice)
{
	const struct io_uring_params p = *params;
	struct io_uring_sqe *sqe;
	struct io_uring_cqe *cqe;
	size_t sq_len, cq_len;
	char *sq, *cq;

	sq_len = p.sq_off.array + p.sq_entries * sizeof(__u32);
	cq_len = p.cq_off.cqes + p.cq_entries * sizeof(*cqe);
	sq = mmap(NULL, sq_len, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
		  IORING_OFF_SQ_RING);
	cq = mmap(NULL, cq_len, PROT_READ | PROT_WRITE, MAP_SHARED, ring,
		  IORING_OFF_CQ_RING);
	sqe = mmap(NULL, p.sq_entries * sizeof(*sqe), PROT_READ | PROT_WRITE,
		   MAP_SHARED, ring, IORING_OFF_SQES);
	if (sq == MAP_FAILED || cq == MAP_FAILED || sqe == MAP_FAILED)
		return -errno;
	memset(sqe, 0, sizeof(*sqe));
	sqe->opcode = IORING_OP_MADVISE;
	sqe->addr = (uintptr_t)addr;
	sqe->len = len;
	sqe->fadvise_advice = advice;
	*(__u32 *)(sq + p.sq_off.array) = 0;
	__atomic_store_n((__u32 *)(sq + p.sq_off.tail), 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS,
		    NULL, 0) != 1 ||
	    __atomic_load_n((__u32 *)(cq + p.cq_off.tail), __ATOMIC_ACQUIRE) != 1)
		return -EIO;
	cqe = (struct io_uring_cqe *)(cq + p.cq_off.cqes);
	return cqe->res;
}

TEST_F(all, io_uring_madvise)
{
	struct row *row = &self->row;
	struct io_uring_params params = {};
	int ring = syscall(__NR_io_uring_setup, 1, &params);

	if (ring < 0)
		SKIP(return, "no io_uring: %s", strerror(errno));
	ASSERT_EQ(0, uring_madvise(ring, &params, AT(2), LEN(2), MADV_DONTNEED));
	REPORTED(MAYBE_STALE, 2, 4);
}

TEST_F(all, mprotect)
{
	struct row *row = &self->row;
	int prot = PROT_READ | (row->memory->read_only ? 0 : PROT_WRITE);

	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), PROT_NONE));
	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), PROT_READ));
	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), prot));
	ASSERT_EQ(0, mprotect(AT(2), LEN(1), PROT_NONE));
	ASSERT_EQ(0, mprotect(AT(2), LEN(1), prot));
	touch(row, AT(0), UNITS);
	SILENT();
}

static bool soft_dirty(const char *addr)
{
	int fd = open("/proc/self/pagemap", O_RDONLY);
	uint64_t entry = 1ULL << 55;
	off_t at = (uintptr_t)addr / getpagesize() * sizeof(entry);

	if (pread(fd, &entry, sizeof(entry), at) != sizeof(entry))
		entry = 1ULL << 55;
	close(fd);
	return entry & 1ULL << 55;
}

TEST_F(all, soft_dirty)
{
	struct row *row = &self->row;
	int fd = open("/proc/self/clear_refs", O_WRONLY);

	ASSERT_LE(0, fd);
	ASSERT_EQ(1, write(fd, "4", 1));
	if (soft_dirty(AT(0)))
		SKIP(return, "no soft-dirty bit");
	touch(row, AT(0), UNITS);
	EXPECT_TRUE(row->memory != &anon || soft_dirty(AT(0)));
	SILENT();
}

/* A userfaultfd with @features, for which the mapping is registered. */
static int uffd_register(struct row *row, char *addr, int units,
			 uint64_t features, uint64_t mode)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	struct uffdio_register reg = {
		.range = { .start = (uintptr_t)addr, .len = LEN(units) },
		.mode = mode,
	};
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd < 0 || ioctl(fd, UFFDIO_API, &api) ||
	    ioctl(fd, UFFDIO_REGISTER, &reg))
		return -1;
	return fd;
}

/* The write splits a huge page that is in a page table of its own kind. */
#define WRITE_PROTECTED() do {						\
	if (row->memory == &thp)					\
		RECORD(0);						\
	else								\
		SILENT();						\
} while (0)

TEST_F(all, uffd_wp)
{
	struct row *row = &self->row;
	struct uffdio_writeprotect wp = {
		.range = { .start = (uintptr_t)AT(0), .len = LEN(UNITS) },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int fd = uffd_register(row, AT(0), UNITS, UFFD_FEATURE_WP_ASYNC,
			       UFFDIO_REGISTER_MODE_WP);

	if (fd < 0)
		SKIP(return, "no write protection: %s", strerror(errno));
	ASSERT_EQ(0, ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	touch(row, AT(0), UNITS);
	wp.mode = 0;
	ASSERT_EQ(0, ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	close(fd);
	WRITE_PROTECTED();
}

TEST_F(all, pagemap_scan_wp)
{
	struct row *row = &self->row;
	struct page_region regions[UNITS * 2];
	struct pm_scan_arg arg = {
		.size = sizeof(arg),
		.flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
		.start = (uintptr_t)AT(0),
		.end = (uintptr_t)AT(UNITS),
		.vec = (uintptr_t)regions,
		.vec_len = ARRAY_SIZE(regions),
		.category_mask = PAGE_IS_WRITTEN,
		.return_mask = PAGE_IS_WRITTEN,
	};
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	int fd = uffd_register(row, AT(0), UNITS, UFFD_FEATURE_WP_ASYNC |
			       UFFD_FEATURE_WP_UNPOPULATED,
			       UFFDIO_REGISTER_MODE_WP);

	if (fd < 0)
		SKIP(return, "no write protection: %s", strerror(errno));
	ASSERT_LE(1, ioctl(pagemap, PAGEMAP_SCAN, &arg));
	EXPECT_EQ((uintptr_t)AT(UNITS), arg.walk_end);
	touch(row, AT(0), UNITS);
	WRITE_PROTECTED();
}

TEST_F(all, pkey_mprotect)
{
	int pkey = syscall(__NR_pkey_alloc, 0, 0);
	struct row *row = &self->row;

	if (pkey < 0)
		SKIP(return, "no protection keys: %s", strerror(errno));
	ASSERT_EQ(0, syscall(__NR_pkey_mprotect, AT(0), LEN(UNITS), PROT_READ,
			     pkey));
	SILENT();
}

/*
 * The child gets copies of pinned pages. Huge ones that are private are known
 * false alarms.
 */
TEST_F(all, fork)
{
	struct row *row = &self->row;
	struct child child;

	if (child_start(_metadata, &child))
		_exit(0);
	if (row->memory == &hugetlb || row->memory == &thp)
		RECORD(0);
	else
		SILENT();
	touch(row, AT(0), UNITS);
	EXPECT_SILENT("write_after_fork");
	EXPECT_EQ(0, child_finish(&child));
	touch(row, AT(0), UNITS);
	EXPECT_SILENT("write_after_exit_of_child");
}

/* What a child does to its own mapping is no business of the parent's. */
TEST_F(all, fork_child_changes)
{
	struct row *row = &self->row;
	struct child child;

	if (child_start(_metadata, &child)) {
		touch(row, AT(0), UNITS);
		if (munmap(AT(1), LEN(1)) ||
		    madvise(AT(2), LEN(1), MADV_DONTNEED))
			_exit(2);
		execlp("true", "true", NULL);
		_exit(3);
	}
	record(_metadata, row, "fork", 0);
	EXPECT_EQ(0, child_finish(&child));
	SILENT();
}

#define ADVICE(advice) { advice, #advice }

/* On the whole mapping, so that none is split. Not all memory takes all. */
TEST_F(all, advice)
{
	static const struct {
		int advice;
		const char *name;
	} advice_list[] = {
		ADVICE(MADV_COLD), ADVICE(MADV_HUGEPAGE),
		ADVICE(MADV_NOHUGEPAGE), ADVICE(MADV_DONTFORK),
		ADVICE(MADV_DOFORK), ADVICE(MADV_WIPEONFORK),
		ADVICE(MADV_KEEPONFORK), ADVICE(MADV_DONTDUMP),
		ADVICE(MADV_DODUMP), ADVICE(MADV_RANDOM),
		ADVICE(MADV_SEQUENTIAL), ADVICE(MADV_NORMAL),
		ADVICE(MADV_WILLNEED), ADVICE(MADV_POPULATE_READ),
		ADVICE(MADV_POPULATE_WRITE),
	};
	struct row *row = &self->row;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(advice_list); i++) {
		int ret = madvise(AT(0), LEN(UNITS), advice_list[i].advice);

		record(_metadata, row, advice_list[i].name, ret ? errno : 0);
		EXPECT_EQ(0, row->reasons) {
			TH_LOG("%s", advice_list[i].name);
		}
	}
}

TEST_F(all, mlock)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, mlock(AT(0), LEN(UNITS)));
	ASSERT_EQ(0, munlock(AT(0), LEN(UNITS)));
	SILENT();
}

/* Not judged from here to the end of the fixture */

TEST_F(all, madv_free)
{
	struct row *row = &self->row;

	RECORD(madvise(AT(0), LEN(UNITS), MADV_FREE));
}

/* Private pages need swap space to go anywhere. */
TEST_F(all, madv_pageout)
{
	struct row *row = &self->row;

	RECORD(madvise(AT(0), LEN(UNITS), MADV_PAGEOUT));
}

/* The node that the page is not on, or -1 if there is no other. */
static int other_node(void *page)
{
	int status = -1, node;

	if (syscall(__NR_move_pages, 0, 1, &page, NULL, &status, 0) || status < 0)
		return -1;
	for (node = 0; node < 2; node++) {
		char path[64];

		snprintf(path, sizeof(path), "/sys/devices/system/node/node%d",
			 node);
		if (node != status && !access(path, F_OK))
			return node;
	}
	return -1;
}

TEST_F(all, move_pages)
{
	struct row *row = &self->row;
	int node = other_node(AT(2)), status = 0, ret;
	void *page = AT(2);

	if (node < 0)
		SKIP(return, "only one memory node");
	ret = syscall(__NR_move_pages, 0, 1, &page, &node, &status,
		      MPOL_MF_MOVE);
	if (status < 0 && ret >= 0) {
		errno = -status;
		ret = -1;
	}
	RECORD(ret);
}

TEST_F(all, mbind)
{
	struct row *row = &self->row;
	int node = other_node(AT(2));
	unsigned long mask = 1UL << node;

	if (node < 0)
		SKIP(return, "only one memory node");
	RECORD(syscall(__NR_mbind, AT(0), LEN(UNITS), MPOL_BIND, &mask, 8,
		       MPOL_MF_MOVE | MPOL_MF_STRICT));
}

/*
 * Rows for memory that is mapped by pages, to which hugetlb says EINVAL
 */
FIXTURE(paged)
{
	struct row row;
};

FIXTURE_VARIANT(paged)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(paged, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(paged, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(paged, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(paged, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(paged, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(paged, thp) { .memory = &thp };

FIXTURE_SETUP(paged)
{
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(paged)
{
	row_teardown(_metadata, &self->row);
}

TEST_F(paged, mremap_dontunmap)
{
	struct row *row = &self->row;

	ASSERT_NE(MAP_FAILED, mremap(AT(2), LEN(2), LEN(2),
				     MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL));
	REPORTED(UNMAPPED, 2, 4);
}

TEST_F(paged, mremap_grow)
{
	struct row *row = &self->row;

	ASSERT_EQ(AT(0), mremap(AT(0), LEN(UNITS), LEN(UNITS + 1), 0));
	SILENT();
}

/* Installing them again replaces nothing. */
TEST_F(paged, guard_install)
{
	struct row *row = &self->row;

	if (madvise(AT(2), LEN(2), MADV_GUARD_INSTALL))
		SKIP(return, "no guard pages: %s", strerror(errno));
	REPORTED(MAYBE_STALE, 2, 4);
	ASSERT_EQ(0, madvise(AT(2), LEN(2), MADV_GUARD_INSTALL));
	EXPECT_SILENT("guard_install_again");
}

static int file_write(const char *path, const char *value)
{
	int fd = open(path, O_WRONLY);
	ssize_t ret = fd < 0 ? -1 : write(fd, value, strlen(value));

	close(fd);
	return ret < 0 ? -1 : 0;
}

#define NUMA_DEBUG	"/sys/kernel/debug/sched/numa_balancing/"

/*
 * Rows for memory that the balancing of memory nodes looks at, which is none of
 * hugetlb
 */
FIXTURE(balanced)
{
	struct row row;
};

FIXTURE_VARIANT(balanced)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(balanced, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(balanced, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(balanced, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(balanced, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(balanced, thp) { .memory = &thp };

FIXTURE_SETUP(balanced)
{
	unsigned int cpu;
	cpu_set_t cpus;

	/* Stay near the memory, so that there is no reason to move it. */
	ASSERT_EQ(0, getcpu(&cpu, NULL));
	CPU_ZERO(&cpus);
	CPU_SET(cpu, &cpus);
	ASSERT_EQ(0, sched_setaffinity(0, sizeof(cpus), &cpus));
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(balanced)
{
	row_teardown(_metadata, &self->row);
}

/*
 * The scan runs in the task itself, every so often that it has run. The first
 * ones may leave a mapping alone.
 */
TEST_F_TIMEOUT(balanced, numa_hinting, 300)
{
	static const struct {
		const char *path, *value;
	} knobs[] = {
		{ "/proc/sys/kernel/numa_balancing", "1" },
		{ NUMA_DEBUG "scan_delay_ms", "10" },
		{ NUMA_DEBUG "scan_period_min_ms", "10" },
		{ NUMA_DEBUG "scan_period_max_ms", "100" },
	};
	struct row *row = &self->row;
	long long was[ARRAY_SIZE(knobs)], scans = 0;
	time_t end = time(NULL) + 200;
	bool set = true;
	size_t i;

	if (other_node(AT(0)) < 0)
		SKIP(return, "only one memory node");
	for (i = 0; i < ARRAY_SIZE(knobs); i++) {
		was[i] = file_number(knobs[i].path, "");
		if (was[i] < 0 || file_write(knobs[i].path, knobs[i].value))
			set = false;
	}
	while (set && scans >= 0 && scans < 4 && time(NULL) < end) {
		for (i = 0; i < 10; i++)
			touch(row, AT(0), UNITS);
		scans = file_number("/proc/self/sched", "mm->numa_scan_seq");
	}
	for (i = 0; i < ARRAY_SIZE(knobs); i++) {
		char old[24];

		snprintf(old, sizeof(old), "%lld", was[i]);
		if (was[i] >= 0)
			file_write(knobs[i].path, old);
	}
	if (scans < 4)
		SKIP(return, "no NUMA balancing, or no debugfs to hasten it");
	SILENT();
}

/*
 * Rows for files, changed by another process
 */
FIXTURE(file)
{
	struct row row;
};

FIXTURE_VARIANT(file)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(file, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(file, memfd_private) { .memory = &memfd_private };
FIXTURE_VARIANT_ADD(file, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(file, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(file, hugetlb_shared) { .memory = &hugetlb_shared };

FIXTURE_SETUP(file)
{
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(file)
{
	row_teardown(_metadata, &self->row);
}

TEST_F(file, truncate)
{
	struct row *row = &self->row;
	pid_t child = fork();

	if (!child)
		_exit(ftruncate(row->fd, LEN(2)) != 0);
	ASSERT_EQ(0, child_wait(child));
	REPORTED(MAYBE_STALE, 2, 4);
}

/* A private page that was written is not the file's any more: not judged. */
TEST_F(file, punch_hole)
{
	struct row *row = &self->row;
	pid_t child = fork();
	int err;

	if (!child)
		_exit(fallocate(row->fd, FALLOC_FL_PUNCH_HOLE |
				FALLOC_FL_KEEP_SIZE, LEN(2), LEN(1)) ? errno : 0);
	err = child_wait(child);
	if (err == EOPNOTSUPP && row->memory->file == DISK)
		SKIP(return, "the file system makes no holes");
	ASSERT_EQ(0, err);
	if (row->memory->flags & MAP_PRIVATE)
		RECORD(0);
	else
		REPORTED(MAYBE_STALE, 2, 3);
}

/*
 * Rows for shared and writable memory
 */
FIXTURE(shared)
{
	struct row row;
};

FIXTURE_VARIANT(shared)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(shared, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(shared, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(shared, hugetlb_shared) { .memory = &hugetlb_shared };

FIXTURE_SETUP(shared)
{
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(shared)
{
	row_teardown(_metadata, &self->row);
}

TEST_F(shared, madv_remove)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, madvise(AT(2), LEN(1), MADV_REMOVE));
	REPORTED(MAYBE_STALE, 2, 3);
}

TEST_F(shared, remap_file_pages)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, syscall(__NR_remap_file_pages, AT(2), LEN(1), 0, 0, 0)) {
		TH_LOG("%s", strerror(errno));
	}
	REPORTED(UNMAPPED, 2, 3);
}

/*
 * An address space that goes away, while the FDs stay open in another process:
 * here only the counter can be seen.
 */
struct owner {
	pid_t pid;
	int sock;
	struct notify notify;
};

static void owner_start(struct __test_metadata *_metadata, struct owner *owner,
			const struct memory *memory)
{
	union {
		struct cmsghdr cmsg;
		char room[CMSG_SPACE(2 * sizeof(int))];
	} control = {};
	char c;
	struct iovec iov = { .iov_base = &c, .iov_len = 1 };
	struct msghdr msg = {
		.msg_iov = &iov,
		.msg_iovlen = 1,
		.msg_control = &control,
		.msg_controllen = sizeof(control),
	};
	struct row row = {};
	struct cmsghdr *cmsg;
	int socks[2];

	ASSERT_EQ(0, socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, socks));
	owner->pid = fork();
	ASSERT_LE(0, owner->pid);
	if (!owner->pid) {
		close(socks[0]);
		row_setup(_metadata, &row, memory);
		if (_metadata->exit_code)
			_exit(0);
		cmsg = CMSG_FIRSTHDR(&msg);
		cmsg->cmsg_level = SOL_SOCKET;
		cmsg->cmsg_type = SCM_RIGHTS;
		cmsg->cmsg_len = CMSG_LEN(2 * sizeof(int));
		((int *)CMSG_DATA(cmsg))[0] = row.notify.ctx;
		((int *)CMSG_DATA(cmsg))[1] = row.notify.queue;
		if (sendmsg(socks[1], &msg, 0) != 1 || read(socks[1], &c, 1) != 1)
			_exit(1);
		if (c == 'e') {
			dup2(socks[1], STDIN_FILENO);
			dup2(socks[1], STDOUT_FILENO);
			execlp("cat", "cat", "/proc/self/comm", "-", NULL);
		}
		_exit(0);
	}
	close(socks[1]);
	owner->sock = socks[0];
	if (recvmsg(socks[0], &msg, 0) != 1) {
		ASSERT_NE(0, _metadata->exit_code);
		return;
	}
	cmsg = CMSG_FIRSTHDR(&msg);
	ASSERT_NE(NULL, cmsg);
	owner->notify.ctx = ((int *)CMSG_DATA(cmsg))[0];
	owner->notify.queue = ((int *)CMSG_DATA(cmsg))[1];
	owner->notify.page = mmap(NULL, getpagesize(), PROT_READ, MAP_SHARED,
				  owner->notify.queue, 0);
	ASSERT_NE(MAP_FAILED, owner->notify.page);
	owner->notify.seen = generation(&owner->notify);
}

static void owner_reported(struct __test_metadata *_metadata,
			   struct owner *owner, const char *memory,
			   bool reported)
{
	unsigned long long hits = generation(&owner->notify) - owner->notify.seen;
	struct ib_uverbs_mmu_notify_event e;

	printf("# row %s / %s: %s, %llu hits\n", _metadata->name, memory,
	       hits ? "reported" : "none", hits);
	fflush(stdout);
	EXPECT_EQ(reported, hits != 0);
	EXPECT_EQ(-EPERM, events_read(&owner->notify, &e, 1));
}

FIXTURE(gone)
{
	struct owner owner;
};

FIXTURE_VARIANT(gone)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(gone, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(gone, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(gone, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(gone, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(gone, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(gone, hugetlb) { .memory = &hugetlb };
FIXTURE_VARIANT_ADD(gone, hugetlb_shared) { .memory = &hugetlb_shared };
FIXTURE_VARIANT_ADD(gone, thp) { .memory = &thp };

FIXTURE_SETUP(gone)
{
	owner_start(_metadata, &self->owner, variant->memory);
}

FIXTURE_TEARDOWN(gone)
{
	notify_close(&self->owner.notify);
}

TEST_F(gone, exit)
{
	ASSERT_EQ(1, write(self->owner.sock, "x", 1));
	ASSERT_EQ(0, child_wait(self->owner.pid));
	owner_reported(_metadata, &self->owner, variant->memory->name, true);
}

/* Seen while the process lives on, with another program. */
TEST_F(gone, exec)
{
	char comm[4] = {};

	ASSERT_EQ(1, write(self->owner.sock, "e", 1));
	ASSERT_EQ(4, read(self->owner.sock, comm, 4));
	EXPECT_EQ(0, memcmp(comm, "cat\n", 4));
	owner_reported(_metadata, &self->owner, variant->memory->name, true);
	close(self->owner.sock);
	kill(self->owner.pid, SIGKILL);
	child_wait(self->owner.pid);
}

/*
 * The process is held on its way out, before it gives up its memory. What
 * others may share is not reaped, nor is hugetlb.
 */
TEST_F(gone, process_mrelease)
{
	bool reaped = variant->memory->flags & MAP_PRIVATE &&
		      variant->memory != &hugetlb;
	pid_t pid = self->owner.pid;
	int pidfd = syscall(__NR_pidfd_open, pid, 0), status;

	ASSERT_LE(0, pidfd);
	ASSERT_EQ(0, ptrace(PTRACE_SEIZE, pid, NULL, PTRACE_O_TRACEEXIT));
	ASSERT_EQ(0, kill(pid, SIGKILL));
	ASSERT_EQ(pid, waitpid(pid, &status, 0));
	ASSERT_TRUE(WIFSTOPPED(status));
	ASSERT_EQ(PTRACE_EVENT_EXIT, status >> 16);
	ASSERT_EQ(self->owner.notify.seen, generation(&self->owner.notify));
	ASSERT_EQ(0, syscall(__NR_process_mrelease, pidfd, 0)) {
		TH_LOG("%s", strerror(errno));
	}
	owner_reported(_metadata, &self->owner, variant->memory->name, reaped);
	ASSERT_EQ(0, ptrace(PTRACE_CONT, pid, NULL, 0));
	EXPECT_EQ(-SIGKILL, child_wait(pid));
}

/*
 * Rows that bring their own memory
 */
FIXTURE(own)
{
	struct row row;
};

FIXTURE_SETUP(own)
{
	notify_open(_metadata, &self->row.notify);
}

FIXTURE_TEARDOWN(own)
{
	row_teardown(_metadata, &self->row);
}

/* Memory that is mapped at @addr already. */
static void own_map(struct row *row, const struct memory *memory, void *addr)
{
	row->memory = memory;
	row->unit = getpagesize();
	row->fd = -1;
	row->map = addr;
}

/* Each of these returns whether the test has been skipped. */
static int own_prepare(struct __test_metadata *_metadata, struct row *row,
		       const struct memory *memory)
{
	row_map(_metadata, row, memory);
	if (!_metadata->exit_code)
		row_watch(_metadata, row, AT(FROM), LEN(TO - FROM));
	return _metadata->exit_code;
}

TEST_F(own, brk)
{
	static const struct memory heap = { .name = "heap" };
	struct row *row = &self->row;
	size_t page = getpagesize();
	uintptr_t addr = (uintptr_t)sbrk(0);

	addr = (addr + page - 1) & ~(page - 1);
	own_map(row, &heap, (void *)addr);
	ASSERT_EQ(0, brk(AT(UNITS)));
	touch(row, AT(0), UNITS);
	row_watch(_metadata, row, AT(FROM), LEN(TO - FROM));

	ASSERT_EQ(0, brk(AT(2)));
	REPORTED(UNMAPPED, 2, TO);
	ASSERT_EQ(0, brk(AT(UNITS)));
	touch(row, AT(0), UNITS);
	EXPECT_SILENT("brk_regrow");
}

static const struct memory sysv_shm = { .name = "sysv_shm" };

static int shm_setup(struct __test_metadata *_metadata, struct row *row)
{
	int id = shmget(IPC_PRIVATE, UNITS * getpagesize(), 0600);

	if (id < 0)
		SKIP(return _metadata->exit_code, "no System V shared memory");
	own_map(row, &sysv_shm, shmat(id, NULL, 0));
	shmctl(id, IPC_RMID, NULL);
	ASSERT_NE(MAP_FAILED, row->map);
	touch(row, AT(0), UNITS);
	row_watch(_metadata, row, AT(FROM), LEN(TO - FROM));
	return 0;
}

TEST_F(own, shmdt)
{
	struct row *row = &self->row;

	if (shm_setup(_metadata, row))
		return;
	ASSERT_EQ(0, shmdt(AT(0)));
	REPORTED(UNMAPPED, FROM, TO);
}

TEST_F(own, shmat_remap)
{
	struct row *row = &self->row;
	int id;

	if (shm_setup(_metadata, row))
		return;
	id = shmget(IPC_PRIVATE, getpagesize(), 0600);
	ASSERT_LE(0, id);
	EXPECT_EQ(AT(2), shmat(id, AT(2), SHM_REMAP));
	shmctl(id, IPC_RMID, NULL);
	REPORTED(UNMAPPED, 2, 3);
}

/* invalidate_inode_pages2() does not mind the pin. */
TEST_F(own, direct_write)
{
	struct row *row = &self->row;
	char path[64], *buffer;
	int fd;

	if (own_prepare(_metadata, row, &file_ro))
		return;
	buffer = pages_map(_metadata, &row->notify, 1);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", row->fd);
	fd = open(path, O_RDWR | O_DIRECT);
	if (fd < 0)
		SKIP(return, "no direct I/O: %s", strerror(errno));
	ASSERT_EQ(LEN(1), pwrite(fd, buffer, LEN(1), LEN(2)));
	REPORTED(MAYBE_STALE, 2, 3);
}

/* Write-back of a page that is registered for reading write-protects it. */
TEST_F(own, msync)
{
	static const struct memory file_shared = { .name = "file_shared" };
	struct row *row = &self->row;
	int fd;

	own_map(row, &file_shared, NULL);
	fd = disk_file(LEN(UNITS));
	if (fd < 0)
		SKIP(return, "no file system in TEST_DIR");
	row->map = mmap(NULL, LEN(UNITS), PROT_READ | PROT_WRITE, MAP_SHARED,
			fd, 0);
	ASSERT_NE(MAP_FAILED, row->map);
	touch(row, AT(0), UNITS);
	row->mr = mr_of(&row->notify, AT(FROM), LEN(TO - FROM));
	row->mr.access = MR_READ;
	ASSERT_EQ(0, mr_settle(row->notify.ctx, row->mr));
	ASSERT_EQ(0, mr_watch(row->notify.ctx, &row->mr, row->notify.queue,
			      COOKIE));
	ASSERT_EQ(0, msync(AT(0), LEN(UNITS), MS_SYNC));
	touch(row, AT(0), UNITS);
	ASSERT_EQ(0, msync(AT(0), LEN(UNITS), MS_SYNC));
	SILENT();
}

/* Not judged from here on */

#define KSM	"/sys/kernel/mm/ksm/"

TEST_F_TIMEOUT(own, ksm, 300)
{
	struct row *row = &self->row;
	long long run = file_number(KSM "run", ""), scans;
	time_t end = time(NULL) + 200;
	char old[24];
	int i;

	if (own_prepare(_metadata, row, &anon))
		return;
	if (run < 0)
		SKIP(return, "no KSM");
	snprintf(old, sizeof(old), "%lld", run);
	for (i = 0; i < UNITS; i++)
		memset(AT(i), 0x77, row->unit);
	ASSERT_EQ(0, madvise(AT(0), LEN(UNITS), MADV_MERGEABLE));
	scans = file_number(KSM "full_scans", "");
	ASSERT_EQ(0, file_write(KSM "run", "1"));
	/* A page is merged in the scan after the one that saw it unchanged. */
	while (file_number(KSM "full_scans", "") < scans + 4 && time(NULL) < end)
		usleep(1000);
	file_write(KSM "run", old);
	if (file_number(KSM "full_scans", "") < scans + 4)
		SKIP(return, "KSM does not get round");
	EXPECT_LT(0, file_number(KSM "pages_shared", ""));
	RECORD(0);
}

TEST_F(own, compaction)
{
	struct row *row = &self->row;

	if (own_prepare(_metadata, row, &anon))
		return;
	if (file_write("/proc/sys/vm/compact_memory", "1"))
		SKIP(return, "no compaction");
	RECORD(0);
}

TEST_F(own, uffdio_move)
{
	struct row *row = &self->row;
	struct uffdio_move move;
	char *to;
	int fd;

	if (own_prepare(_metadata, row, &anon))
		return;
	to = mmap(AT(2 * UNITS), LEN(1), PROT_READ | PROT_WRITE,
		  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	ASSERT_EQ(AT(2 * UNITS), to);
	fd = uffd_register(row, to, 1, UFFD_FEATURE_MOVE,
			   UFFDIO_REGISTER_MODE_MISSING);
	if (fd < 0)
		SKIP(return, "no UFFDIO_MOVE: %s", strerror(errno));
	move = (struct uffdio_move){
		.dst = (uintptr_t)to,
		.src = (uintptr_t)AT(2),
		.len = LEN(1),
	};
	RECORD(ioctl(fd, UFFDIO_MOVE, &move));
}

static long long uprobe_type(void)
{
	return file_number("/sys/bus/event_source/devices/uprobe/type", "");
}

/* The instruction is replaced when the probe comes, and again when it goes. */
TEST_F(own, uprobe)
{
	struct perf_event_attr attr = {
		.size = sizeof(attr),
		.type = uprobe_type(),
	};
	struct row *row = &self->row;
	char path[64];
	int probe;

	if (uprobe_type() < 0)
		SKIP(return, "no uprobes");
	row_map(_metadata, row, &file_private);
	if (_metadata->exit_code)
		return;
	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), PROT_READ | PROT_EXEC));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", row->fd);
	attr.config1 = (uintptr_t)path;
	attr.config2 = LEN(2);
	probe = syscall(__NR_perf_event_open, &attr, 0, -1, -1, 0);
	if (probe < 0)
		SKIP(return, "no uprobe here: %s", strerror(errno));
	close(probe);

	row->mr = mr_of(&row->notify, AT(FROM), LEN(TO - FROM));
	row->mr.access = MR_READ;
	ASSERT_EQ(0, mr_watch(row->notify.ctx, &row->mr, row->notify.queue,
			      COOKIE));
	record(_metadata, row, "uprobe_before", 0);
	probe = syscall(__NR_perf_event_open, &attr, 0, -1, -1, 0);
	ASSERT_LE(0, probe);
	record(_metadata, row, "uprobe_register", 0);
	close(probe);
	record(_metadata, row, "uprobe_unregister", 0);
}

/* One huge page, or as many small ones, of which the MR is only 16 to 19. */
static int part_setup(struct __test_metadata *_metadata, struct row *row,
		      bool huge)
{
	row->memory = &thp;
	row->unit = HUGE_2M;
	row->fd = -1;
	row->map = find_room(row, 1);
	ASSERT_NE(NULL, row->map);
	ASSERT_NE(NULL, map_memory(row, row->map, 1));
	if (!huge)
		madvise(AT(0), LEN(1), MADV_NOHUGEPAGE);
	touch(row, AT(0), 1);
	if (huge != (huge_bytes(AT(0), LEN(1)) == LEN(1)))
		SKIP(return _metadata->exit_code, "no transparent huge pages");
	row_watch(_metadata, row, AT(0) + 16 * getpagesize(),
		  4 * getpagesize());
	return 0;
}

TEST_F(own, thp_mprotect_of_neighbour)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	RECORD(mprotect(AT(0), getpagesize(), PROT_READ));
}

TEST_F(own, thp_munmap_of_neighbour)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	RECORD(munmap(AT(0), getpagesize()));
}

TEST_F(own, thp_dontneed_of_neighbour)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	RECORD(madvise(AT(0), getpagesize(), MADV_DONTNEED));
}

TEST_F(own, thp_dontfork_of_neighbour)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	RECORD(madvise(AT(0), getpagesize(), MADV_DONTFORK));
}

TEST_F(own, madv_collapse)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, false))
		return;
	madvise(AT(0), LEN(1), MADV_HUGEPAGE);
	RECORD(madvise(AT(0), LEN(1), MADV_COLLAPSE));
}

/*
 * Memory of a device that is there only in the test of HMM. What the device
 * does at first is judged.
 */
static int hmm(struct row *row, unsigned long request)
{
	char *copy = malloc(LEN(TO - FROM));
	struct hmm_dmirror_cmd cmd = {
		.addr = (uintptr_t)AT(FROM),
		.ptr = (uintptr_t)copy,
		.npages = TO - FROM,
	};
	int fd = open("/dev/hmm_dmirror0", O_RDWR), ret;

	ret = fd < 0 ? -1 : ioctl(fd, request, &cmd);
	close(fd);
	free(copy);
	return ret;
}

TEST_F(own, migrate_to_device)
{
	struct row *row = &self->row;

	if (access("/dev/hmm_dmirror0", F_OK))
		SKIP(return, "no test of HMM: modprobe test_hmm");
	if (own_prepare(_metadata, row, &anon))
		return;
	/* Nothing is there, as pages that are pinned do not move. */
	ASSERT_EQ(-1, hmm(row, HMM_DMIRROR_MIGRATE_TO_DEV));
	ASSERT_EQ(ENOENT, errno);
	SILENT();
	touch(row, AT(0), UNITS);
	record(_metadata, row, "migrate_from_device", 0);
}

TEST_F(own, exclusive_to_device)
{
	struct row *row = &self->row;

	if (access("/dev/hmm_dmirror0", F_OK))
		SKIP(return, "no test of HMM: modprobe test_hmm");
	if (own_prepare(_metadata, row, &anon))
		return;
	ASSERT_EQ(0, hmm(row, HMM_DMIRROR_EXCLUSIVE));
	SILENT();
	touch(row, AT(0), UNITS);
	record(_metadata, row, "exclusive_from_device", 0);
}

/*
 * Rows for all kinds of memory, and the last ones. Nobody is given a page that is
 * poisoned, but a huge page with one in it may be used again.
 */
FIXTURE(poisoned)
{
	struct row row;
};

FIXTURE_VARIANT(poisoned)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(poisoned, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(poisoned, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(poisoned, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(poisoned, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(poisoned, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(poisoned, hugetlb) { .memory = &hugetlb };
FIXTURE_VARIANT_ADD(poisoned, hugetlb_shared) { .memory = &hugetlb_shared };
FIXTURE_VARIANT_ADD(poisoned, thp) { .memory = &thp };

FIXTURE_SETUP(poisoned)
{
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(poisoned)
{
	row_teardown(_metadata, &self->row);
}

static void ignore(int sig)
{
}

/* A transparent huge page that is pinned cannot be split, and stays. */
TEST_F(poisoned, hwpoison)
{
	struct row *row = &self->row;
	int ret;

	if (row->memory->huge && !getenv("TEST_POISON_HUGE"))
		SKIP(return, "TEST_POISON_HUGE is not set");
	signal(SIGBUS, ignore);
	ret = madvise(AT(2), getpagesize(), MADV_HWPOISON);
	if (ret && (errno == EINVAL || errno == EPERM))
		SKIP(return, "no memory failure");
	if (row->memory == &thp)
		RECORD(ret);
	else
		REPORTED(MAYBE_STALE, 2, 3);
}

/* Not judged. Not of the page that hwpoison takes, which may be in our huge page. */
TEST_F(poisoned, soft_offline)
{
	struct row *row = &self->row;
	int page = row->memory->huge ? getpagesize() : 0;

	RECORD(madvise(AT(2) + page, getpagesize(), MADV_SOFT_OFFLINE));
}

int main(int argc, char **argv)
{
	return notify_main(argc, argv);
}

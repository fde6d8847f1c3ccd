// SPDX-License-Identifier: GPL-2.0
/*
 * What MMU notification reports for each change of the mapping under an MR, by
 * kind of memory. Each test covers one row, or a few, of the table in
 * Documentation/infiniband/user_mmu_notify.rst, and prints each row in one of
 * these forms, the last of them if the owner has gone:
 *
 *   # row <row> / <memory>: <reasons>, units <a>-<b>, <pages>[ (<error>)], <verdict>
 *   # row <row> / <memory>: quiet[ (<error>)], <verdict>
 *   # row <row> / <memory>: skipped (<why>)
 *   # row <row> / <memory>: reported, checked
 *
 * A row is "checked" if the outcome is certain: the change makes the MR stale and
 * must be reported, or it must not be reported. Otherwise the outcome is only
 * "logged". In both cases an event must be within the MR and have advanced the
 * generation. Pages without an event must still be mapped, according to
 * /proc/self/pagemap, so a quiet row is always checked, unless the call failed:
 * then it may have changed nothing. Reported <pages> are "kept" if they are still
 * mapped, "lost" if they are not, and "unknown" if pagemap could not be read. A
 * test without a checked row skips. The last line is:
 *
 *   # rows: checked <n>, logged <n>, skipped <n>
 *
 * Not covered, because nothing triggers them reliably:
 *
 *  - a mremap() that fails after it began to move;
 *  - a race that khugepaged loses;
 *  - the OOM reaper, which does the same as process_mrelease();
 *  - reclaim of a page in the swap cache.
 */
#include <linux/fs.h>
#include <linux/memfd.h>
#include <linux/mempolicy.h>
#include <linux/mman.h>
#include <linux/perf_event.h>
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

/* A mapping has 5 units (pages or huge pages). The MR covers units 1 to 3. */
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

/*
 * A shared and writable mapping would be dirty-tracked and could not be pinned
 * for writing.
 */
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
	int fd;		/* of the mapped file, or -1 */
	struct mr mr;
	uint64_t *pages;	/* of the MR, see pages_track() */
	size_t nr_pages;
	int events;	/* delivered */
	int checked, logged;
	/* The last event, if row_read() has found one */
	unsigned int reasons;
	uint64_t start, end;
};

/* The totals, of all processes. */
static struct {
	unsigned int checked, logged, skipped;
} *totals;

enum verdict { CHECKED, LOGGED };

#define AT(n)		(row->map + (long)(n) * (long)row->unit)
#define LEN(n)		((n) * row->unit)
#define COOKIE		7

static bool is_hugetlb(const struct row *row)
{
	return row->memory == &hugetlb || row->memory == &hugetlb_shared;
}

/* Page frame number and present bit of a pagemap entry. */
static const uint64_t pagemap_same = 1ULL << 63 | ((1ULL << 55) - 1);

static bool pagemap_read(uint64_t addr, uint64_t *entries, size_t count)
{
	ssize_t len = count * sizeof(*entries);
	int fd = open("/proc/self/pagemap", O_RDONLY);
	bool ok = pread(fd, entries, len,
			addr / getpagesize() * sizeof(*entries)) == len;

	close(fd);
	return ok;
}

/*
 * Remember the pages of the MR. pages_forget() zeroes the entries of reported
 * pages: these pages may change without another event.
 */
static void pages_track(struct row *row)
{
	const uint64_t page = getpagesize(), start = row->mr.addr & -page;
	size_t i;

	row->nr_pages = (row->mr.addr + row->mr.length - start + page - 1) / page;
	row->pages = calloc(row->nr_pages, sizeof(*row->pages));
	if (!row->pages || !pagemap_read(start, row->pages, row->nr_pages))
		row->nr_pages = 0;
	for (i = 0; i < row->nr_pages; i++) {
		row->pages[i] &= pagemap_same;
		/* Not privileged to see page frames */
		if (row->pages[i] == 1ULL << 63)
			row->pages[i] = 0;
	}
}

/* Returns whether the unreported pages of the range are still mapped. */
static bool pages_kept(const struct row *row, uint64_t start, uint64_t end)
{
	const uint64_t page = getpagesize(), first = row->mr.addr / page;
	uint64_t *now = calloc(row->nr_pages + 1, sizeof(*now));
	bool kept = !row->nr_pages ||
		    (now && pagemap_read(first * page, now, row->nr_pages));
	uint64_t i;

	for (i = start / page - first; kept && i < row->nr_pages &&
	     (first + i) * page < end; i++)
		kept = !row->pages[i] || row->pages[i] == (now[i] & pagemap_same);
	free(now);
	return kept;
}

static void pages_forget(struct row *row, uint64_t start, uint64_t end)
{
	const uint64_t page = getpagesize(), first = row->mr.addr / page;
	uint64_t i;

	for (i = start / page - first; i < row->nr_pages &&
	     (first + i) * page < end; i++)
		row->pages[i] = 0;
}

/* Read the events since the last row, check them, and print the row. */
static void row_read(struct __test_metadata *_metadata, struct row *row,
		     const char *name, enum verdict verdict, int err)
{
	uint64_t now = generation(&row->notify);
	struct ib_uverbs_mmu_notify_event e[2];
	int events = events_drain(&row->notify, e, 2);

	EXPECT_EQ(row->notify.seen + (events > 0), now);
	row->notify.seen = now;
	row->reasons = 0;
	printf("# row %s / %s: ", name, row->memory->name);
	if (!events) {
		printf("quiet");
		if (!err)
			verdict = CHECKED;
	} else {
		ASSERT_EQ(1, events);
		row->events++;
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
		printf("%s%s%s, units %.2f-%.2f, %s",
		       e->reasons & UNMAPPED ? "UNMAPPED" : "",
		       e->reasons == (UNMAPPED | MAYBE_STALE) ? "|" : "",
		       e->reasons & MAYBE_STALE ? "MAYBE_STALE" : "",
		       (double)(e->start - (uintptr_t)row->map) / row->unit,
		       (double)(e->end - (uintptr_t)row->map) / row->unit,
		       !row->nr_pages ? "unknown" :
		       pages_kept(row, e->start, e->end) ? "kept" : "lost");
		pages_forget(row, e->start, e->end);
	}
	if (err)
		printf(" (%s)", strerror(err));
	printf(", %s\n", verdict == CHECKED ? "checked" : "logged");
	fflush(stdout);
	EXPECT_TRUE(pages_kept(row, row->mr.addr,
			       row->mr.addr + row->mr.length)) {
		TH_LOG("%s: a page was lost without an event", name);
	}
	row->checked += verdict == CHECKED;
	row->logged += verdict == LOGGED;
	__atomic_fetch_add(verdict == CHECKED ? &totals->checked : &totals->logged,
			   1, __ATOMIC_RELAXED);
}

static void row_skipped(const char *name, const struct memory *memory,
			const char *why)
{
	printf("# row %s / %s: skipped (%s)\n", name,
	       memory ? memory->name : "-", why);
	fflush(stdout);
	__atomic_fetch_add(&totals->skipped, 1, __ATOMIC_RELAXED);
}

#define ROW_SKIP(statement, fmt, ...) do {				\
	char _why[80];							\
									\
	snprintf(_why, sizeof(_why), fmt, ##__VA_ARGS__);		\
	row_skipped(_metadata->name, row->memory, _why);		\
	SKIP(statement, "%s", _why);					\
} while (0)

/*
 * A row whose event may be a false alarm. @ret is the result of the call;
 * EINVAL and EOPNOTSUPP mean that the call does not apply to this memory.
 */
#define ROW_LOGGED(name, ret) do {					\
	int _err = (ret) < 0 ? errno : 0;				\
	const char *_name = (name);					\
									\
	if (_err == EINVAL || _err == EOPNOTSUPP)			\
		row_skipped(_name, row->memory, strerror(_err));	\
	else								\
		row_read(_metadata, row, _name, LOGGED, _err);		\
} while (0)

#define LOGGED(ret)	ROW_LOGGED(_metadata->name, ret)

#define ROW_QUIET(name) do {						\
	row_read(_metadata, row, name, CHECKED, 0);			\
	EXPECT_EQ(0, row->reasons);					\
} while (0)

#define QUIET()		ROW_QUIET(_metadata->name)

#define ROW_REPORTED(name, _reasons, from, to) do {			\
	row_read(_metadata, row, name, CHECKED, 0);			\
	EXPECT_EQ(_reasons, row->reasons);				\
	EXPECT_EQ((uintptr_t)AT(from), row->start);			\
	EXPECT_EQ((uintptr_t)AT(to), row->end);				\
} while (0)

#define REPORTED(reasons, from, to) \
	ROW_REPORTED(_metadata->name, reasons, from, to)

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

/* A file on disk, written back so that only the test changes it. */
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
	memset(fill, 0x90, len);	/* code on x86, see uprobe */
	if (pwrite(fd, fill, len, 0) != (ssize_t)len || fsync(fd)) {
		close(fd);
		fd = -1;
	}
	free(fill);
	return fd;
}

/* How many bytes are mapped by huge page table entries. */
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

/* An aligned unmapped range of 2 * @units. */
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

static void row_register(struct __test_metadata *_metadata, struct row *row,
			 void *addr, size_t len, uint64_t access)
{
	row->mr = mr_of(&row->notify, addr, len);
	row->mr.access = access;
	ASSERT_EQ(0, mr_watch(row->notify.ctx, &row->mr, row->notify.fd,
			      COOKIE));
	pages_track(row);
}

static void row_watch(struct __test_metadata *_metadata, struct row *row,
		      void *addr, size_t len)
{
	struct ib_uverbs_mmu_notify_event e[2];
	int events;

	row_register(_metadata, row, addr, len,
		     row->memory->read_only ? MR_READ : MR_WRITE);
	/* The pin may have replaced pages. */
	events = events_drain(&row->notify, e, 2);
	ASSERT_LE(0, events);
	ASSERT_GE(1, events);
	row->events += events;
	row->notify.seen = generation(&row->notify);
}

/* The number after @key, at the start of a line of @path, or -1. */
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
			ROW_SKIP(return, "memfd_create: %s", strerror(errno));
		ASSERT_EQ(0, ftruncate(row->fd, LEN(UNITS)));
	} else if (memory->file == DISK) {
		row->fd = disk_file(LEN(UNITS));
		if (row->fd < 0)
			ROW_SKIP(return, "no file system in TEST_DIR");
	}
	/* fork() copies pinned huge pages, and the child has no reservation. */
	if (is_hugetlb(row) && file_number(FREE_HUGEPAGES, "") < 3 * UNITS)
		ROW_SKIP(return, "too few huge pages");
	row->map = find_room(row, 2 * UNITS);
	ASSERT_NE(NULL, row->map);
	row->map = map_memory(row, row->map, UNITS);
	if (!row->map && is_hugetlb(row))
		ROW_SKIP(return, "no huge pages: %s", strerror(errno));
	ASSERT_NE(NULL, row->map);
	touch(row, row->map, UNITS);
	if (memory == &thp && huge_bytes(row->map, LEN(UNITS)) != LEN(UNITS))
		ROW_SKIP(return, "no transparent huge pages");
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
	if (_metadata->exit_code || row->checked)
		return;
	if (row->logged)
		SKIP(return, "logged only");
	SKIP(return, "does not apply to this memory");
}

/* A child that waits for child_finish(), or for the end of its parent. */
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
 * Rows for any kind of memory
 */
FIXTURE(any_memory)
{
	struct row row;
};

FIXTURE_VARIANT(any_memory)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(any_memory, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(any_memory, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(any_memory, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(any_memory, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(any_memory, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(any_memory, hugetlb) { .memory = &hugetlb };
FIXTURE_VARIANT_ADD(any_memory, hugetlb_shared) { .memory = &hugetlb_shared };
FIXTURE_VARIANT_ADD(any_memory, thp) { .memory = &thp };

FIXTURE_SETUP(any_memory)
{
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(any_memory)
{
	row_teardown(_metadata, &self->row);
}

/* G1: munmap() of the MR. G2: The generation has advanced when it returns. */
TEST_F(any_memory, munmap)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, munmap(AT(FROM), LEN(TO - FROM)));
	REPORTED(UNMAPPED, FROM, TO);
}

/* G1: munmap() of parts of the MR. G7: munmap() next to the MR is quiet. */
TEST_F(any_memory, munmap_parts)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, munmap(AT(0), LEN(1)));
	ASSERT_EQ(0, munmap(AT(4), LEN(1)));
	ROW_QUIET("munmap_neighbours");
	ASSERT_EQ(0, munmap(AT(2), LEN(1)));
	ROW_REPORTED("munmap_middle", UNMAPPED, 2, 3);
	ASSERT_EQ(0, munmap(AT(1), LEN(1)));
	ROW_REPORTED("munmap_head", UNMAPPED, 1, 2);
	ASSERT_EQ(0, munmap(AT(3), LEN(1)));
	ROW_REPORTED("munmap_tail", UNMAPPED, 3, 4);
}

/* G1: The range is clipped to the MR. */
TEST_F(any_memory, munmap_beyond_both_ends)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, munmap(AT(0), LEN(UNITS)));
	REPORTED(UNMAPPED, FROM, TO);
}

/* G1: munmap() by another process with the same address space. */
TEST_F(any_memory, munmap_by_vfork_child)
{
	struct row *row = &self->row;
	pid_t child = vfork();

	if (!child)
		_exit(munmap(AT(2), LEN(2)) != 0);
	ASSERT_EQ(0, child_wait(child));
	REPORTED(UNMAPPED, 2, 4);
}

/* G1: mmap(MAP_FIXED) over the MR. */
TEST_F(any_memory, mmap_over)
{
	struct row *row = &self->row;

	ASSERT_EQ(AT(2), mmap(AT(2), LEN(1), PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
	REPORTED(UNMAPPED, 2, 3);
}

/* G1: mremap() of the MR. hugetlb invalidates the range once more. */
TEST_F(any_memory, mremap_move)
{
	struct row *row = &self->row;
	char *to = AT(2 * UNITS);

	ASSERT_EQ(to, mremap(AT(2), LEN(2), LEN(2),
			     MREMAP_MAYMOVE | MREMAP_FIXED, to));
	REPORTED(is_hugetlb(row) ? UNMAPPED | MAYBE_STALE : UNMAPPED, 2, 4);
}

/* G1: mremap() that unmaps the end of the MR. */
TEST_F(any_memory, mremap_shrink)
{
	struct row *row = &self->row;

	ASSERT_EQ(AT(0), mremap(AT(0), LEN(UNITS), LEN(2), 0));
	REPORTED(UNMAPPED, 2, TO);
}

/* G1: mremap() of other memory over the MR. */
TEST_F(any_memory, mremap_over)
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

/* G1: MADV_DONTNEED. */
TEST_F(any_memory, madv_dontneed)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, madvise(AT(2), LEN(2), MADV_DONTNEED));
	REPORTED(MAYBE_STALE, 2, 4);
}

/* G1: MADV_DONTNEED_LOCKED. */
TEST_F(any_memory, madv_dontneed_locked)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, mlock(AT(0), LEN(UNITS)));
	ASSERT_EQ(0, madvise(AT(2), LEN(2), MADV_DONTNEED_LOCKED));
	REPORTED(MAYBE_STALE, 2, 4);
}

/* G1: process_madvise(). */
TEST_F(any_memory, process_madvise)
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

/* G1: madvise() by an io_uring worker. */
TEST_F(any_memory, io_uring_madvise)
{
	struct row *row = &self->row;
	struct uring ring;
	int ret = uring_open(&ring);

	if (ret)
		ROW_SKIP(return, "no io_uring: %s", strerror(-ret));
	memset(ring.sqe, 0, sizeof(*ring.sqe));
	ring.sqe->opcode = IORING_OP_MADVISE;
	ring.sqe->addr = (uintptr_t)AT(2);
	ring.sqe->len = LEN(2);
	ring.sqe->fadvise_advice = MADV_DONTNEED;
	ASSERT_EQ(0, uring_submit(&ring));
	ASSERT_EQ(0, uring_wait(&ring));
	REPORTED(MAYBE_STALE, 2, 4);
}

/* G7: mprotect(). */
TEST_F(any_memory, mprotect)
{
	struct row *row = &self->row;
	int prot = PROT_READ | (row->memory->read_only ? 0 : PROT_WRITE);

	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), PROT_NONE));
	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), PROT_READ));
	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), prot));
	ASSERT_EQ(0, mprotect(AT(2), LEN(1), PROT_NONE));
	ASSERT_EQ(0, mprotect(AT(2), LEN(1), prot));
	touch(row, AT(0), UNITS);
	QUIET();
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

/* G7: Soft-dirty tracking. */
TEST_F(any_memory, soft_dirty)
{
	struct row *row = &self->row;
	int fd = open("/proc/self/clear_refs", O_WRONLY);

	ASSERT_LE(0, fd);
	ASSERT_EQ(1, write(fd, "4", 1));
	if (soft_dirty(AT(0)))
		ROW_SKIP(return, "no soft-dirty bit");
	touch(row, AT(0), UNITS);
	EXPECT_TRUE(row->memory != &anon || soft_dirty(AT(0)));
	QUIET();
}

/* A write to a write-protected transparent huge page splits it. */
#define WRITE_PROTECTED() do {						\
	if (row->memory == &thp)					\
		LOGGED(0);						\
	else								\
		QUIET();						\
} while (0)

/* G7: Write protection by userfaultfd. */
TEST_F(any_memory, uffd_wp)
{
	struct row *row = &self->row;
	struct uffdio_writeprotect wp = {
		.range = { .start = (uintptr_t)AT(0), .len = LEN(UNITS) },
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int fd = uffd_open(AT(0), LEN(UNITS), UFFD_FEATURE_WP_ASYNC,
			   UFFDIO_REGISTER_MODE_WP);

	if (fd < 0)
		ROW_SKIP(return, "no write protection: %s", strerror(-fd));
	ASSERT_EQ(0, ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	touch(row, AT(0), UNITS);
	wp.mode = 0;
	ASSERT_EQ(0, ioctl(fd, UFFDIO_WRITEPROTECT, &wp));
	close(fd);
	WRITE_PROTECTED();
}

/* G7: Read and write protection by userfaultfd. */
TEST_F(any_memory, uffd_rwp)
{
	struct row *row = &self->row;
	struct uffdio_rwprotect rwp = {
		.range = { .start = (uintptr_t)AT(0), .len = LEN(UNITS) },
		.mode = UFFDIO_RWPROTECT_MODE_RWP,
	};
	int fd = uffd_open(AT(0), LEN(UNITS),
			   UFFD_FEATURE_RWP | UFFD_FEATURE_RWP_ASYNC,
			   UFFDIO_REGISTER_MODE_RWP);

	if (fd < 0)
		ROW_SKIP(return, "no UFFDIO_RWPROTECT: %s", strerror(-fd));
	ASSERT_EQ(0, ioctl(fd, UFFDIO_RWPROTECT, &rwp));
	touch(row, AT(0), UNITS);
	rwp.mode = 0;
	ASSERT_EQ(0, ioctl(fd, UFFDIO_RWPROTECT, &rwp));
	close(fd);
	WRITE_PROTECTED();
}

/* G7: Write protection by PAGEMAP_SCAN. */
TEST_F(any_memory, pagemap_scan_wp)
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
	int fd = uffd_open(AT(0), LEN(UNITS), UFFD_FEATURE_WP_ASYNC |
			   UFFD_FEATURE_WP_UNPOPULATED,
			   UFFDIO_REGISTER_MODE_WP);

	if (fd < 0)
		ROW_SKIP(return, "no write protection: %s", strerror(-fd));
	ASSERT_LE(1, ioctl(pagemap, PAGEMAP_SCAN, &arg));
	EXPECT_EQ((uintptr_t)AT(UNITS), arg.walk_end);
	touch(row, AT(0), UNITS);
	WRITE_PROTECTED();
}

/* G7: pkey_mprotect(). */
TEST_F(any_memory, pkey_mprotect)
{
	int pkey = syscall(__NR_pkey_alloc, 0, 0);
	struct row *row = &self->row;

	if (pkey < 0)
		ROW_SKIP(return, "no protection keys: %s", strerror(errno));
	ASSERT_EQ(0, syscall(__NR_pkey_mprotect, AT(0), LEN(UNITS), PROT_READ,
			     pkey));
	QUIET();
}

/*
 * G7: fork() and later writes. Pinned pages are copied for the child. Private
 * huge pages cause false alarms.
 */
TEST_F(any_memory, fork)
{
	struct row *row = &self->row;
	struct child child;

	if (child_start(_metadata, &child))
		_exit(0);
	if (row->memory == &hugetlb || row->memory == &thp)
		LOGGED(0);
	else
		QUIET();
	touch(row, AT(0), UNITS);
	ROW_QUIET("write_after_fork");
	EXPECT_EQ(0, child_finish(&child));
	touch(row, AT(0), UNITS);
	ROW_QUIET("write_after_exit_of_child");
}

/* G7: Changes of its own mapping by a child are not reported. */
TEST_F(any_memory, fork_child_changes)
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
	ROW_LOGGED("fork", 0);
	EXPECT_EQ(0, child_finish(&child));
	QUIET();
}

/* G7: madvise() that does not split the mapping is not reported. */
TEST_F(any_memory, madvise_hints)
{
	static const struct {
		int advice;
		const char *name;
	} advice_list[] = {
		{ MADV_COLD, "madv_cold" },
		{ MADV_HUGEPAGE, "madv_hugepage" },
		{ MADV_NOHUGEPAGE, "madv_nohugepage" },
		{ MADV_DONTFORK, "madv_dontfork" },
		{ MADV_DOFORK, "madv_dofork" },
		{ MADV_WIPEONFORK, "madv_wipeonfork" },
		{ MADV_KEEPONFORK, "madv_keeponfork" },
		{ MADV_DONTDUMP, "madv_dontdump" },
		{ MADV_DODUMP, "madv_dodump" },
		{ MADV_RANDOM, "madv_random" },
		{ MADV_SEQUENTIAL, "madv_sequential" },
		{ MADV_NORMAL, "madv_normal" },
		{ MADV_WILLNEED, "madv_willneed" },
		{ MADV_POPULATE_READ, "madv_populate_read" },
		{ MADV_POPULATE_WRITE, "madv_populate_write" },
	};
	struct row *row = &self->row;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(advice_list); i++) {
		const char *name = advice_list[i].name;

		if (!madvise(AT(0), LEN(UNITS), advice_list[i].advice)) {
			ROW_QUIET(name);
			continue;
		}
		EXPECT_EQ(EINVAL, errno);
		row_skipped(name, row->memory, strerror(errno));
	}
}

/* G7: mlock(). */
TEST_F(any_memory, mlock)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, mlock(AT(0), LEN(UNITS)));
	ASSERT_EQ(0, munlock(AT(0), LEN(UNITS)));
	QUIET();
}

/* From here to the end of the fixture an event may be a false alarm. */

/* G1: MADV_FREE skips pinned pages. */
TEST_F(any_memory, madv_free)
{
	struct row *row = &self->row;

	LOGGED(madvise(AT(0), LEN(UNITS), MADV_FREE));
}

/* G1: MADV_PAGEOUT. For private pages this needs swap space. */
TEST_F(any_memory, madv_pageout)
{
	struct row *row = &self->row;

	LOGGED(madvise(AT(0), LEN(UNITS), MADV_PAGEOUT));
}

/* A NUMA node without the page, or -1. */
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

/* G1: move_pages() skips pinned pages. */
TEST_F(any_memory, move_pages)
{
	struct row *row = &self->row;
	int node = other_node(AT(2)), status = 0, ret;
	void *page = AT(2);

	if (node < 0)
		ROW_SKIP(return, "only one NUMA node");
	ret = syscall(__NR_move_pages, 0, 1, &page, &node, &status,
		      MPOL_MF_MOVE);
	if (status < 0 && ret >= 0) {
		errno = -status;
		ret = -1;
	}
	LOGGED(ret);
}

/* G1: mbind() skips pinned pages. */
TEST_F(any_memory, mbind)
{
	struct row *row = &self->row;
	int node = other_node(AT(2));
	unsigned long mask = 1UL << node;

	if (node < 0)
		ROW_SKIP(return, "only one NUMA node");
	LOGGED(syscall(__NR_mbind, AT(0), LEN(UNITS), MPOL_BIND, &mask, 8,
		       MPOL_MF_MOVE | MPOL_MF_STRICT));
}

/*
 * Rows for any memory but hugetlb, on which these calls fail with EINVAL
 */
FIXTURE(not_hugetlb)
{
	struct row row;
};

FIXTURE_VARIANT(not_hugetlb)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(not_hugetlb, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(not_hugetlb, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(not_hugetlb, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(not_hugetlb, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(not_hugetlb, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(not_hugetlb, thp) { .memory = &thp };

FIXTURE_SETUP(not_hugetlb)
{
	row_setup(_metadata, &self->row, variant->memory);
}

FIXTURE_TEARDOWN(not_hugetlb)
{
	row_teardown(_metadata, &self->row);
}

/* G1: MREMAP_DONTUNMAP. */
TEST_F(not_hugetlb, mremap_dontunmap)
{
	struct row *row = &self->row;

	ASSERT_NE(MAP_FAILED, mremap(AT(2), LEN(2), LEN(2),
				     MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL));
	REPORTED(UNMAPPED, 2, 4);
}

/* G7: mremap() that grows in place. */
TEST_F(not_hugetlb, mremap_grow)
{
	struct row *row = &self->row;

	ASSERT_EQ(AT(0), mremap(AT(0), LEN(UNITS), LEN(UNITS + 1), 0));
	QUIET();
}

/* G1: MADV_GUARD_INSTALL is reported if there are pages. */
TEST_F(not_hugetlb, madv_guard_install)
{
	struct row *row = &self->row;

	if (madvise(AT(2), LEN(2), MADV_GUARD_INSTALL))
		ROW_SKIP(return, "no guard pages: %s", strerror(errno));
	REPORTED(MAYBE_STALE, 2, 4);
	ASSERT_EQ(0, madvise(AT(2), LEN(2), MADV_GUARD_INSTALL));
	ROW_QUIET("madv_guard_install_again");
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
 * Rows for memory that takes part in NUMA balancing
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

	/* Stay on the node of the memory, so that it is not migrated. */
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
 * G7: NUMA hinting. The task scans its own memory after it has run for a while.
 * The first scans may skip a mapping.
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
		ROW_SKIP(return, "only one NUMA node");
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
		ROW_SKIP(return, "no NUMA balancing or no debugfs");
	QUIET();
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

/* G1: ftruncate(). */
TEST_F(file, ftruncate)
{
	struct row *row = &self->row;
	pid_t child = fork();

	if (!child)
		_exit(ftruncate(row->fd, LEN(2)) != 0);
	ASSERT_EQ(0, child_wait(child));
	REPORTED(MAYBE_STALE, 2, 4);
}

/* G1: Punching a hole. A private copy may or may not be reported. */
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
		ROW_SKIP(return, "no hole punching on this file system");
	ASSERT_EQ(0, err);
	if (row->memory->flags & MAP_PRIVATE)
		LOGGED(0);
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

/* G1: MADV_REMOVE. */
TEST_F(shared, madv_remove)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, madvise(AT(2), LEN(1), MADV_REMOVE));
	REPORTED(MAYBE_STALE, 2, 3);
}

/* G1: remap_file_pages(). */
TEST_F(shared, remap_file_pages)
{
	struct row *row = &self->row;

	ASSERT_EQ(0, syscall(__NR_remap_file_pages, AT(2), LEN(1), 0, 0, 0)) {
		TH_LOG("%s", strerror(errno));
	}
	REPORTED(UNMAPPED, 2, 3);
}

/*
 * The owner of an address space. The FDs stay open in another process. When the
 * address space is torn down, that process can load the generation, but cannot
 * read the events.
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
		((int *)CMSG_DATA(cmsg))[1] = row.notify.fd;
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
	owner->notify.fd = ((int *)CMSG_DATA(cmsg))[1];
	owner->notify.page = mmap(NULL, getpagesize(), PROT_READ, MAP_SHARED,
				  owner->notify.fd, 0);
	ASSERT_NE(MAP_FAILED, owner->notify.page);
	owner->notify.seen = generation(&owner->notify);
}

static void owner_reported(struct __test_metadata *_metadata,
			   struct owner *owner, const char *memory,
			   bool reported)
{
	uint64_t now = generation(&owner->notify);
	struct ib_uverbs_mmu_notify_event e;

	printf("# row %s / %s: %s, checked\n", _metadata->name, memory,
	       now == owner->notify.seen ? "quiet" : "reported");
	fflush(stdout);
	/* The generation advances only once, as nobody can read the event. */
	EXPECT_EQ(owner->notify.seen + reported, now);
	EXPECT_EQ(-EPERM, events_read(&owner->notify, &e, 1));
	__atomic_fetch_add(&totals->checked, 1, __ATOMIC_RELAXED);
}

FIXTURE(mm_teardown)
{
	struct owner owner;
};

FIXTURE_VARIANT(mm_teardown)
{
	const struct memory *memory;
};

FIXTURE_VARIANT_ADD(mm_teardown, anon) { .memory = &anon };
FIXTURE_VARIANT_ADD(mm_teardown, shared_anon) { .memory = &shared_anon };
FIXTURE_VARIANT_ADD(mm_teardown, memfd) { .memory = &memfd };
FIXTURE_VARIANT_ADD(mm_teardown, file_private) { .memory = &file_private };
FIXTURE_VARIANT_ADD(mm_teardown, file_ro) { .memory = &file_ro };
FIXTURE_VARIANT_ADD(mm_teardown, hugetlb) { .memory = &hugetlb };
FIXTURE_VARIANT_ADD(mm_teardown, hugetlb_shared) { .memory = &hugetlb_shared };
FIXTURE_VARIANT_ADD(mm_teardown, thp) { .memory = &thp };

FIXTURE_SETUP(mm_teardown)
{
	owner_start(_metadata, &self->owner, variant->memory);
}

FIXTURE_TEARDOWN(mm_teardown)
{
	notify_close(&self->owner.notify);
}

/* G8: Exit of the owner. G2: The generation has advanced when it is gone. */
TEST_F(mm_teardown, exit)
{
	ASSERT_EQ(1, write(self->owner.sock, "x", 1));
	ASSERT_EQ(0, child_wait(self->owner.pid));
	owner_reported(_metadata, &self->owner, variant->memory->name, true);
}

/* G8: exec() by the owner, which then runs another program. */
TEST_F(mm_teardown, exec)
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
 * G1: process_mrelease() of a process that is stopped in exit, before it
 * releases its memory. Shared memory and hugetlb are not reaped.
 */
TEST_F(mm_teardown, process_mrelease)
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
 * Rows that set up their own memory
 */
FIXTURE(custom_memory)
{
	struct row row;
};

FIXTURE_SETUP(custom_memory)
{
	notify_open(_metadata, &self->row.notify);
}

FIXTURE_TEARDOWN(custom_memory)
{
	row_teardown(_metadata, &self->row);
}

/* Use what is mapped at @addr. */
static void custom_map(struct row *row, const struct memory *memory, void *addr)
{
	row->memory = memory;
	row->unit = getpagesize();
	row->fd = -1;
	row->map = addr;
}

/* Returns whether the test is to be skipped. */
static int custom_prepare(struct __test_metadata *_metadata, struct row *row,
			  const struct memory *memory)
{
	row_map(_metadata, row, memory);
	if (!_metadata->exit_code)
		row_watch(_metadata, row, AT(FROM), LEN(TO - FROM));
	return _metadata->exit_code;
}

/* G1: brk() that shrinks. */
TEST_F(custom_memory, brk)
{
	static const struct memory heap = { .name = "heap" };
	struct row *row = &self->row;
	size_t page = getpagesize();
	uintptr_t addr = (uintptr_t)sbrk(0);

	addr = (addr + page - 1) & ~(page - 1);
	custom_map(row, &heap, (void *)addr);
	ASSERT_EQ(0, brk(AT(UNITS)));
	touch(row, AT(0), UNITS);
	row_watch(_metadata, row, AT(FROM), LEN(TO - FROM));

	ASSERT_EQ(0, brk(AT(2)));
	REPORTED(UNMAPPED, 2, TO);
	ASSERT_EQ(0, brk(AT(UNITS)));
	touch(row, AT(0), UNITS);
	ROW_QUIET("brk_regrow");
}

static const struct memory sysv_shm = { .name = "sysv_shm" };

/* Returns whether the test is to be skipped. */
static int shm_setup(struct __test_metadata *_metadata, struct row *row)
{
	int id = shmget(IPC_PRIVATE, UNITS * getpagesize(), 0600);

	if (id < 0)
		ROW_SKIP(return _metadata->exit_code, "no System V shared memory");
	custom_map(row, &sysv_shm, shmat(id, NULL, 0));
	shmctl(id, IPC_RMID, NULL);
	ASSERT_NE(MAP_FAILED, row->map);
	touch(row, AT(0), UNITS);
	row_watch(_metadata, row, AT(FROM), LEN(TO - FROM));
	return 0;
}

/* G1: shmdt(). */
TEST_F(custom_memory, shmdt)
{
	struct row *row = &self->row;

	if (shm_setup(_metadata, row))
		return;
	ASSERT_EQ(0, shmdt(AT(0)));
	REPORTED(UNMAPPED, FROM, TO);
}

/* G1: shmat() with SHM_REMAP over the MR. */
TEST_F(custom_memory, shmat_remap)
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

/* G1: Direct I/O invalidates the page cache in spite of the pin. */
TEST_F(custom_memory, direct_write)
{
	struct row *row = &self->row;
	char path[64], *buffer;
	int fd;

	if (custom_prepare(_metadata, row, &file_ro))
		return;
	buffer = pages_map(_metadata, &row->notify, 1);
	snprintf(path, sizeof(path), "/proc/self/fd/%d", row->fd);
	fd = open(path, O_RDWR | O_DIRECT);
	if (fd < 0)
		ROW_SKIP(return, "no direct I/O: %s", strerror(errno));
	ASSERT_EQ(LEN(1), pwrite(fd, buffer, LEN(1), LEN(2)));
	REPORTED(MAYBE_STALE, 2, 3);
}

/* G7: Write-back only write-protects the page. */
TEST_F(custom_memory, fsync_writeback)
{
	static const struct memory file_shared = { .name = "file_shared" };
	struct row *row = &self->row;
	int fd;

	custom_map(row, &file_shared, NULL);
	fd = disk_file(LEN(UNITS));
	if (fd < 0)
		ROW_SKIP(return, "no file system in TEST_DIR");
	row->map = mmap(NULL, LEN(UNITS), PROT_READ | PROT_WRITE, MAP_SHARED,
			fd, 0);
	ASSERT_NE(MAP_FAILED, row->map);
	touch(row, AT(0), UNITS);
	row->mr = mr_of(&row->notify, AT(FROM), LEN(TO - FROM));
	row->mr.access = MR_READ;
	ASSERT_EQ(0, mr_settle(row->notify.ctx, row->mr));
	row_register(_metadata, row, AT(FROM), LEN(TO - FROM), MR_READ);
	ASSERT_EQ(0, fsync(fd));
	touch(row, AT(0), UNITS);
	ASSERT_EQ(0, fsync(fd));
	QUIET();
}

/* A private mapping of a file, without a copy of a page. */
static const struct memory private_file = {
	.name = "private_file", .flags = MAP_PRIVATE, .file = DISK,
	.read_only = true,
};

/*
 * G3: The pin of a registration for reading copies the pages of the file, so
 * the MR is born stale. A later write replaces no page.
 */
TEST_F(custom_memory, private_file_page)
{
	struct row *row = &self->row;

	row_map(_metadata, row, &private_file);
	if (_metadata->exit_code)
		return;
	row_register(_metadata, row, AT(FROM), LEN(TO - FROM), MR_READ);
	REPORTED(MAYBE_STALE, FROM, TO);
	pages_track(row);
	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), PROT_READ | PROT_WRITE));
	memset(AT(0), 1, LEN(UNITS));
	ROW_QUIET("private_file_page_written");
}

static const struct memory rodata = { .name = "rodata" };

/* G3: Constants of the program are also born stale. The next MR is clean. */
TEST_F(custom_memory, rodata)
{
	static const char constant[] = "constant";
	struct row *row = &self->row;

	custom_map(row, &rodata, (void *)((uintptr_t)constant & -getpagesize()));
	ASSERT_EQ('c', __atomic_load_n(constant, __ATOMIC_RELAXED));
	row_register(_metadata, row, AT(0), LEN(1), MR_READ);
	REPORTED(MAYBE_STALE, 0, 1);
	EXPECT_EQ(row->events, mr_destroy(row->notify.ctx, &row->mr));
	row->events = 0;
	row_register(_metadata, row, AT(0), LEN(1), MR_READ);
	ROW_QUIET("rodata_again");
}

#define KSM	"/sys/kernel/mm/ksm/"

/* Let KSM merge the pages. Returns whether KSM has tried. */
static bool ksm_run(struct row *row)
{
	long long run = file_number(KSM "run", "");
	long long scans = file_number(KSM "full_scans", "");
	time_t end = time(NULL) + 200;
	char old[24];
	int i;

	for (i = 0; i < UNITS; i++)
		memset(AT(i), 0x77, row->unit);
	if (run < 0 || madvise(AT(0), LEN(UNITS), MADV_MERGEABLE) ||
	    file_write(KSM "run", "1"))
		return false;
	/* A page is merged in the scan after the one that saw it unchanged. */
	while (file_number(KSM "full_scans", "") < scans + 4 && time(NULL) < end)
		usleep(1000);
	snprintf(old, sizeof(old), "%lld", run);
	file_write(KSM "run", old);
	return file_number(KSM "full_scans", "") >= scans + 4;
}

/* Returns whether the test is to be skipped. */
static int ksm_page_setup(struct __test_metadata *_metadata, struct row *row)
{
	uint64_t pages[UNITS];
	int i;

	row_map(_metadata, row, &anon);
	if (_metadata->exit_code)
		return _metadata->exit_code;
	if (!ksm_run(row))
		ROW_SKIP(return _metadata->exit_code, "no KSM");
	ASSERT_TRUE(pagemap_read((uintptr_t)AT(0), pages, UNITS));
	for (i = 1; i < UNITS; i++)
		if ((pages[i] & pagemap_same) != (pages[0] & pagemap_same))
			ROW_SKIP(return _metadata->exit_code, "not merged");
	return 0;
}

/* G3: The pin copies merged pages, so the MR is born stale. */
TEST_F_TIMEOUT(custom_memory, ksm_page, 300)
{
	struct row *row = &self->row;

	if (ksm_page_setup(_metadata, row))
		return;
	row_register(_metadata, row, AT(FROM), LEN(TO - FROM), MR_WRITE);
	REPORTED(MAYBE_STALE, FROM, TO);
	pages_track(row);
	touch(row, AT(0), UNITS);
	ROW_QUIET("ksm_page_written");
}

/* G3: Merged pages that are registered for reading are also born stale. */
TEST_F_TIMEOUT(custom_memory, ksm_page_read_only, 300)
{
	struct row *row = &self->row;

	if (ksm_page_setup(_metadata, row))
		return;
	row_register(_metadata, row, AT(FROM), LEN(TO - FROM), MR_READ);
	REPORTED(MAYBE_STALE, FROM, TO);
	pages_track(row);
	touch(row, AT(0), UNITS);
	ROW_QUIET("ksm_page_read_only_written");
}

/* From here on an event may be a false alarm. */

/* G1: KSM skips pinned pages. */
TEST_F_TIMEOUT(custom_memory, ksm, 300)
{
	struct row *row = &self->row;

	if (custom_prepare(_metadata, row, &anon))
		return;
	if (!ksm_run(row))
		ROW_SKIP(return, "no KSM");
	EXPECT_LT(0, file_number(KSM "pages_shared", ""));
	LOGGED(0);
}

/* G1: Compaction skips pinned pages. */
TEST_F(custom_memory, compaction)
{
	struct row *row = &self->row;

	if (custom_prepare(_metadata, row, &anon))
		return;
	if (file_write("/proc/sys/vm/compact_memory", "1"))
		ROW_SKIP(return, "no compaction");
	LOGGED(0);
}

/* G1: UFFDIO_MOVE skips pinned pages. */
TEST_F(custom_memory, uffdio_move)
{
	struct row *row = &self->row;
	struct uffdio_move move;
	char *to;
	int fd;

	if (custom_prepare(_metadata, row, &anon))
		return;
	to = mmap(AT(2 * UNITS), LEN(1), PROT_READ | PROT_WRITE,
		  MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	ASSERT_EQ(AT(2 * UNITS), to);
	fd = uffd_open(to, LEN(1), UFFD_FEATURE_MOVE,
		       UFFDIO_REGISTER_MODE_MISSING);
	if (fd < 0)
		ROW_SKIP(return, "no UFFDIO_MOVE: %s", strerror(-fd));
	move = (struct uffdio_move){
		.dst = (uintptr_t)to,
		.src = (uintptr_t)AT(2),
		.len = LEN(1),
	};
	LOGGED(ioctl(fd, UFFDIO_MOVE, &move));
}

static long long uprobe_type(void)
{
	return file_number("/sys/bus/event_source/devices/uprobe/type", "");
}

/* G1: Adding a uprobe, and removing it, replaces the instruction. */
TEST_F(custom_memory, uprobe)
{
	struct perf_event_attr attr = {
		.size = sizeof(attr),
		.type = uprobe_type(),
	};
	struct row *row = &self->row;
	char path[64];
	int probe;

	if (uprobe_type() < 0)
		ROW_SKIP(return, "no uprobes");
	row_map(_metadata, row, &file_private);
	if (_metadata->exit_code)
		return;
	ASSERT_EQ(0, mprotect(AT(0), LEN(UNITS), PROT_READ | PROT_EXEC));
	snprintf(path, sizeof(path), "/proc/self/fd/%d", row->fd);
	attr.config1 = (uintptr_t)path;
	attr.config2 = LEN(2);
	probe = syscall(__NR_perf_event_open, &attr, 0, -1, -1, 0);
	if (probe < 0)
		ROW_SKIP(return, "no uprobe here: %s", strerror(errno));
	close(probe);

	row_register(_metadata, row, AT(FROM), LEN(TO - FROM), MR_READ);
	ROW_LOGGED("uprobe_before", 0);
	pages_track(row);
	probe = syscall(__NR_perf_event_open, &attr, 0, -1, -1, 0);
	ASSERT_LE(0, probe);
	ROW_LOGGED("uprobe_register", 0);
	close(probe);
	ROW_LOGGED("uprobe_unregister", 0);
}

/*
 * Map one huge page, or the same range with base pages. The MR covers base
 * pages 16 to 19. Returns whether the test is to be skipped.
 */
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
		ROW_SKIP(return _metadata->exit_code, "no transparent huge pages");
	row_watch(_metadata, row, AT(0) + 16 * getpagesize(),
		  4 * getpagesize());
	return 0;
}

/* G1: mprotect() of another part splits the huge page. */
TEST_F(custom_memory, thp_mprotect_other_part)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	LOGGED(mprotect(AT(0), getpagesize(), PROT_READ));
}

/* G1: munmap() of another part splits the huge page. */
TEST_F(custom_memory, thp_munmap_other_part)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	LOGGED(munmap(AT(0), getpagesize()));
}

/* G1: MADV_DONTNEED of another part splits the huge page. */
TEST_F(custom_memory, thp_madv_dontneed_other_part)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	LOGGED(madvise(AT(0), getpagesize(), MADV_DONTNEED));
}

/* G1: MADV_DONTFORK of another part splits the mapping and the huge page. */
TEST_F(custom_memory, thp_madv_dontfork_other_part)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, true))
		return;
	LOGGED(madvise(AT(0), getpagesize(), MADV_DONTFORK));
}

/* G1: MADV_COLLAPSE skips pinned pages. */
TEST_F(custom_memory, madv_collapse)
{
	struct row *row = &self->row;

	if (part_setup(_metadata, row, false))
		return;
	madvise(AT(0), LEN(1), MADV_HUGEPAGE);
	LOGGED(madvise(AT(0), LEN(1), MADV_COLLAPSE));
}

/* A request to the device of test_hmm, for the pages of the MR. */
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

/* G7: Migration to a device skips pinned pages. */
TEST_F(custom_memory, hmm_migrate)
{
	struct row *row = &self->row;

	if (access("/dev/hmm_dmirror0", F_OK))
		ROW_SKIP(return, "test_hmm is not loaded");
	if (custom_prepare(_metadata, row, &anon))
		return;
	/* The device finds no page that it can migrate. */
	ASSERT_EQ(-1, hmm(row, HMM_DMIRROR_MIGRATE_TO_DEV));
	ASSERT_EQ(ENOENT, errno);
	QUIET();
	touch(row, AT(0), UNITS);
	ROW_LOGGED("hmm_migrate_back", 0);
}

/* G7: Exclusive access by a device lasts until the CPU accesses the page. */
TEST_F(custom_memory, hmm_exclusive)
{
	struct row *row = &self->row;

	if (access("/dev/hmm_dmirror0", F_OK))
		ROW_SKIP(return, "test_hmm is not loaded");
	if (custom_prepare(_metadata, row, &anon))
		return;
	ASSERT_EQ(0, hmm(row, HMM_DMIRROR_EXCLUSIVE));
	/* The pages stay, but are unmapped until the CPU accesses them. */
	pages_forget(row, (uintptr_t)AT(FROM), (uintptr_t)AT(TO));
	QUIET();
	touch(row, AT(0), UNITS);
	ROW_LOGGED("hmm_exclusive_end", 0);
}

/*
 * Rows that poison pages of any kind of memory. They come last: a huge page
 * with a poisoned page in it may be allocated again.
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

static void ignore_signal(int sig)
{
}

/* G1: Memory failure. A pinned THP cannot be split, so it stays. */
TEST_F(poisoned, madv_hwpoison)
{
	struct row *row = &self->row;
	int ret;

	if (row->memory->huge && !getenv("TEST_POISON_HUGE"))
		ROW_SKIP(return, "TEST_POISON_HUGE is not set");
	signal(SIGBUS, ignore_signal);
	ret = madvise(AT(2), getpagesize(), MADV_HWPOISON);
	if (ret && (errno == EINVAL || errno == EPERM))
		ROW_SKIP(return, "memory failure handling is not available");
	if (row->memory == &thp)
		LOGGED(ret);
	else
		REPORTED(MAYBE_STALE, 2, 3);
}

/* G1: Soft offlining skips pinned pages. The first may be poisoned already. */
TEST_F(poisoned, madv_soft_offline)
{
	struct row *row = &self->row;
	int page = row->memory->huge ? getpagesize() : 0;

	LOGGED(madvise(AT(2) + page, getpagesize(), MADV_SOFT_OFFLINE));
}

static void print_totals(void)
{
	printf("# rows: checked %u, logged %u, skipped %u\n", totals->checked,
	       totals->logged, totals->skipped);
}

int main(int argc, char **argv)
{
	totals = mmap(NULL, sizeof(*totals), PROT_READ | PROT_WRITE,
		      MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	if (totals == MAP_FAILED)
		ksft_exit_fail_perror("mmap");
	atexit(print_totals);
	return notify_main(argc, argv);
}

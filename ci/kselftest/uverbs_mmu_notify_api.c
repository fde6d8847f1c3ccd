// SPDX-License-Identifier: GPL-2.0
/*
 * The interface of MMU notification: what registration refuses, what events
 * say, what is stale from the beginning, read(), the counter page, and what
 * other processes may do.
 */
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/uio.h>

#include "uverbs_mmu_notify.h"

#define COOKIE	0x123456789abcdef0ULL
#define RECORD	sizeof(struct ib_uverbs_mmu_notify_event)

/* These flags have no name in the uapi headers. */
#define REREG_TRANS	1
#define REREG_PD	2
#define REREG_ACCESS	4

/* A context, and six pages of which nothing is registered yet. */
FIXTURE(api)
{
	struct notify notify;
	char *map;
	size_t page;
};

FIXTURE_SETUP(api)
{
	notify_open(_metadata, &self->notify);
	self->page = getpagesize();
	self->map = pages_map(_metadata, &self->notify, 6);
}

FIXTURE_TEARDOWN(api)
{
	notify_close(&self->notify);
}

#define PAGE(n)		(self->map + (n) * self->page)
#define LEN(n)		((n) * self->page)
#define UNMAP(from, n)	ASSERT_EQ(0, munmap(PAGE(from), LEN(n)))
#define MR(from, n)	mr_of(&self->notify, PAGE(from), LEN(n))

/* A watched MR of these pages. */
#define WATCH(from, n, cookie) ({					\
	struct mr _mr = MR(from, n);					\
									\
	ASSERT_EQ(0, mr_watch(self->notify.ctx, &_mr,			\
			      self->notify.queue, cookie));		\
	EXPECT_QUIET(&self->notify);					\
	_mr;								\
})

/* The only event is this one, for the newest change, and hits were counted. */
#define EXPECT_EVENT(_notify, _cookie, from, to, _reasons, hits) do {	\
	struct ib_uverbs_mmu_notify_event _e[2];			\
	struct notify *_n = (_notify);					\
	uint64_t _now = generation(_n);					\
									\
	ASSERT_EQ(1, events_read(_n, _e, 2));				\
	EXPECT_EQ(_cookie, _e[0].cookie);				\
	EXPECT_EQ((uintptr_t)(from), _e[0].start);			\
	EXPECT_EQ((uintptr_t)(to), _e[0].end);				\
	EXPECT_EQ(_reasons, _e[0].reasons);				\
	EXPECT_EQ(_now, _e[0].generation);				\
	EXPECT_EQ(_n->seen + (hits), _now);				\
	_n->seen = _now;						\
	EXPECT_QUIET(_n);						\
} while (0)

/*
 * What registration refuses
 */

#define EXPECT_REFUSED(err, mr, queue) do {				\
	EXPECT_EQ(err, mr_watch(self->notify.ctx, mr, queue, COOKIE));	\
	EXPECT_QUIET(&self->notify);					\
} while (0)

TEST_F(api, core_support)
{
	uint64_t core_support = 0;
	int ctx = context_open(&core_support);

	ASSERT_LE(0, ctx);
	EXPECT_TRUE(core_support & IB_UVERBS_CORE_SUPPORT_MMU_NOTIFY);
	EXPECT_TRUE(core_support & IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS);
	close(ctx);
}

TEST_F(api, fd_without_cookie)
{
	struct mr mr = MR(0, 1);
	struct call call;

	mr_call_watched(&call, &mr, self->notify.queue, COOKIE);
	call.hdr.num_attrs--;
	EXPECT_EQ(-EINVAL, mr_make(&call, self->notify.ctx, &mr));
	EXPECT_QUIET(&self->notify);
}

TEST_F(api, cookie_without_fd)
{
	struct mr mr = MR(0, 1);
	struct call call;

	mr_call(&call, &mr);
	call_attr(&call, UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, 8, COOKIE);
	EXPECT_EQ(-EINVAL, mr_make(&call, self->notify.ctx, &mr));
	EXPECT_QUIET(&self->notify);
}

TEST_F(api, fd_of_another_context)
{
	struct mr mr = MR(0, 1);
	struct notify other;

	notify_open(_metadata, &other);
	EXPECT_REFUSED(-EBADF, &mr, other.queue);
	EXPECT_QUIET(&other);
}

TEST_F(api, fd_of_another_type)
{
	struct ib_uverbs_create_comp_channel_resp channel;
	struct ib_uverbs_create_comp_channel in = {};
	int null = open("/dev/null", O_RDWR);
	struct mr mr = MR(0, 1);

	ASSERT_LE(0, null);
	EXPECT_REFUSED(-EBADF, &mr, null);
	EXPECT_REFUSED(-EBADF, &mr, self->notify.ctx);

	/* An FD object of the same context. */
	ASSERT_EQ(0, command(self->notify.ctx,
			     IB_USER_VERBS_CMD_CREATE_COMP_CHANNEL, &in,
			     sizeof(in), &channel, sizeof(channel)));
	EXPECT_REFUSED(-EBADF, &mr, channel.fd);
}

TEST_F(api, fd_that_is_not_open)
{
	int fd = dup(self->notify.queue);
	struct mr mr = MR(0, 1);

	ASSERT_EQ(0, close(fd));
	EXPECT_REFUSED(-EBADF, &mr, fd);
	EXPECT_REFUSED(-EBADF, &mr, -1);
	EXPECT_REFUSED(-EINVAL, &mr, 1LL << 32);
}

TEST_F(api, zero_length)
{
	struct mr mr = MR(0, 0);

	EXPECT_REFUSED(-EINVAL, &mr, self->notify.queue);
}

TEST_F(api, wrap_around)
{
	const uint64_t addr = (uintptr_t)self->map, page = self->page;
	const uint64_t ranges[][2] = {
		{ addr, -1 }, { addr, -addr }, { addr, -addr - 1 },
		{ -page, page }, { -page, page - 1 }, { -page, 2 * page },
	};
	struct mr mr = MR(0, 1);
	size_t i;

	for (i = 0; i < ARRAY_SIZE(ranges); i++) {
		mr.addr = ranges[i][0];
		mr.length = ranges[i][1];
		EXPECT_REFUSED(-EINVAL, &mr, self->notify.queue);
	}
}

TEST_F(api, access_flags)
{
	const uint64_t wrong[] = {
		1ULL << 31,
		IB_UVERBS_ACCESS_LOCAL_WRITE | 1 << 10,
		IB_UVERBS_ACCESS_REMOTE_WRITE,
	};
	struct mr mr = MR(0, 1);
	size_t i;

	for (i = 0; i < ARRAY_SIZE(wrong); i++) {
		mr.access = wrong[i];
		EXPECT_REFUSED(-EINVAL, &mr, self->notify.queue);
	}
}

/* It follows the mapping by itself; the device can do it unwatched. */
TEST_F(api, on_demand_paging)
{
	struct mr mr = MR(0, 1);
	struct call call;

	mr.access |= IB_UVERBS_ACCESS_ON_DEMAND;
	mr_call(&call, &mr);
	if (mr_make(&call, self->notify.ctx, &mr))
		SKIP(return, "the device has no on-demand paging");
	EXPECT_REFUSED(-EOPNOTSUPP, &mr, self->notify.queue);
}

/* What fails in the driver, after the watch began, reports nothing. */
TEST_F(api, memory_that_cannot_be_pinned)
{
	struct mr mr = MR(0, 2);

	UNMAP(1, 1);
	EXPECT_REFUSED(-EFAULT, &mr, self->notify.queue);
	UNMAP(0, 1);
	EXPECT_QUIET(&self->notify);
}

/* Nor what fails after the MR was made, even if it would be born stale. */
TEST_F(api, response_that_faults)
{
	char *zero = mmap(NULL, self->page, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	struct mr mrs[] = { MR(0, 1), mr_of(&self->notify, zero, self->page) };
	struct call call;
	size_t i, key;

	ASSERT_NE(MAP_FAILED, zero);
	/* The pin replaces the zero page. */
	ASSERT_EQ(0, __atomic_load_n(zero, __ATOMIC_RELAXED));
	for (i = 0; i < ARRAY_SIZE(mrs); i++) {
		for (key = 0; key < 2; key++) {
			mr_call_watched(&call, &mrs[i], self->notify.queue,
					COOKIE);
			call.hdr.attrs[6 + key].data = 8;	/* not mapped */
			EXPECT_EQ(-EFAULT, call_make(&call, self->notify.ctx));
		}
	}
	UNMAP(0, 1);
	ASSERT_EQ(0, munmap(zero, self->page));
	EXPECT_QUIET(&self->notify);
}

TEST_F(api, unknown_attribute)
{
	struct ib_uverbs_attr *attr;
	struct mr mr = MR(0, 1);
	struct call call;

	mr_call_watched(&call, &mr, self->notify.queue, COOKIE);
	call_attr(&call, 31, 8, 0);
	EXPECT_EQ(-EPROTONOSUPPORT, mr_make(&call, self->notify.ctx, &mr));
	EXPECT_QUIET(&self->notify);

	mr_call_watched(&call, &mr, self->notify.queue, COOKIE);
	attr = call_attr(&call, 31, 8, 0);
	attr->flags = 0;
	ASSERT_EQ(0, mr_make(&call, self->notify.ctx, &mr));
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
}

/* The attributes have their exact length, nothing reserved, and come once. */
TEST_F(api, malformed_attributes)
{
	const struct {
		struct ib_uverbs_attr fd, cookie;
	} wrong[] = {
		{ { .len = 8 }, { .len = 8 } },
		{ { .attr_data.reserved = 1 }, { .len = 8 } },
		{ { .len = 0 }, { .len = 4 } },
		{ { .len = 0 }, { .len = 16 } },	/* then it is a pointer */
		{ { .len = 0 }, { .len = 8, .attr_data.reserved = 1 } },
		{ { .len = 0 }, { .len = 8, .attr_id = UVERBS_ATTR_REG_MR_NOTIFY_FD } },
	};
	struct ib_uverbs_attr *fd, *cookie;
	struct mr mr = MR(0, 1);
	struct call call;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(wrong); i++) {
		mr_call_watched(&call, &mr, self->notify.queue,
				(uintptr_t)self->map);
		cookie = &call.hdr.attrs[call.hdr.num_attrs - 1];
		fd = cookie - 1;
		fd->len = wrong[i].fd.len;
		fd->attr_data = wrong[i].fd.attr_data;
		cookie->len = wrong[i].cookie.len;
		cookie->attr_data = wrong[i].cookie.attr_data;
		if (wrong[i].cookie.attr_id)
			call_attr(&call, UVERBS_ATTR_REG_MR_NOTIFY_FD, 0,
				  self->notify.queue);
		EXPECT_EQ(-EINVAL, mr_make(&call, self->notify.ctx, &mr)) {
			TH_LOG("case %zu", i);
		}
	}
	EXPECT_QUIET(&self->notify);
	WATCH(0, 1, COOKIE);
}

/* The driver might make a new MR, that would not be watched. */
TEST_F(api, rereg)
{
	const unsigned int flags[] = {
		REREG_TRANS, REREG_PD, REREG_ACCESS
	};
	struct mr plain = MR(1, 1), mr = WATCH(0, 1, COOKIE);
	struct ib_uverbs_rereg_mr in = {
		.start = mr.addr,
		.length = mr.length,
		.hca_va = mr.addr,
		.pd_handle = mr.pd,
		.access_flags = MR_READ,
	};
	struct ib_uverbs_rereg_mr_resp out;
	struct call call;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(flags); i++) {
		in.mr_handle = mr.handle;
		in.flags = flags[i];
		EXPECT_EQ(-EOPNOTSUPP,
			  command(self->notify.ctx, IB_USER_VERBS_CMD_REREG_MR,
				  &in, sizeof(in), &out, sizeof(out)));
	}
	mr_call(&call, &plain);
	ASSERT_EQ(0, mr_make(&call, self->notify.ctx, &plain));
	in.mr_handle = plain.handle;
	in.flags = REREG_ACCESS;
	/* Soft-iWARP has no reregistration. */
	EXPECT_EQ(on_siw() ? -EOPNOTSUPP : 0,
		  command(self->notify.ctx, IB_USER_VERBS_CMD_REREG_MR, &in,
			  sizeof(in), &out, sizeof(out)));

	/* The refusals have left it as it was. */
	UNMAP(0, 2);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
	EXPECT_EQ(1, mr_destroy(self->notify.ctx, &mr));
	EXPECT_EQ(0, mr_destroy(self->notify.ctx, &plain));
}

TEST_F(api, refusals_do_no_harm)
{
	struct mr empty = MR(0, 0), unmapped = MR(0, 1);
	int i;

	unmapped.addr = 0;
	WATCH(0, 2, COOKIE);
	for (i = 0; i < 50; i++) {
		EXPECT_REFUSED(-EINVAL, &empty, self->notify.queue);
		EXPECT_REFUSED(-EFAULT, &unmapped, self->notify.queue);
	}
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
	UNMAP(1, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(1), PAGE(2), UNMAPPED, 1);
}

/*
 * What events say
 */

/* An MR need not begin or end with a page, and the event is about the MR. */
TEST_F(api, hull_within_a_page)
{
	char *start = PAGE(0) + 100, *end = PAGE(2) + 200;
	struct mr mr = mr_of(&self->notify, start, end - start);

	ASSERT_EQ(0, mr_watch(self->notify.ctx, &mr, self->notify.queue, COOKIE));
	UNMAP(2, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(2), end, UNMAPPED, 1);
	UNMAP(0, 2);
	EXPECT_EVENT(&self->notify, COOKIE, start, PAGE(2), UNMAPPED, 1);
}

/* Events are about addresses of the CPU. */
TEST_F(api, another_iova)
{
	struct mr mr = MR(1, 2);
	struct call call;

	mr_call_watched(&call, &mr, self->notify.queue, COOKIE);
	call.hdr.attrs[2].data = LEN(1000);
	ASSERT_EQ(0, mr_make(&call, self->notify.ctx, &mr));
	UNMAP(1, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(1), PAGE(2), UNMAPPED, 1);
}

/* Each call bumps, and has when it returns, with or without a read(). */
TEST_F(api, generation)
{
	char *map = pages_map(_metadata, &self->notify, 100);
	struct mr mr = mr_of(&self->notify, map, 100 * self->page);
	int i;

	ASSERT_EQ(0, mr_watch(self->notify.ctx, &mr, self->notify.queue, COOKIE));
	for (i = 0; i < 100; i++) {
		uint64_t before = generation(&self->notify);

		ASSERT_EQ(0, munmap(map + i * self->page, self->page));
		ASSERT_EQ(before + 1, generation(&self->notify));
	}
	EXPECT_EVENT(&self->notify, COOKIE, map, map + 100 * self->page,
		     UNMAPPED, 100);
}

/* What is not read yet merges: the hull, all reasons, the newest generation. */
TEST_F(api, merge)
{
	struct mr mr = WATCH(0, 6, COOKIE);

	ASSERT_EQ(0, madvise(PAGE(1), self->page, MADV_DONTNEED));
	UNMAP(3, 2);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(1), PAGE(5),
		     UNMAPPED | MAYBE_STALE, 2);

	/* What was read does not. */
	ASSERT_EQ(0, madvise(PAGE(2), self->page, MADV_DONTNEED));
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(2), PAGE(3), MAYBE_STALE, 1);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
	/* What nobody read does not count. */
	UNMAP(5, 1);
	EXPECT_EQ(3, mr_destroy(self->notify.ctx, &mr));
	self->notify.seen++;
	EXPECT_QUIET(&self->notify);
}

/* The count is of what was read, and nothing is read after it was returned. */
TEST_F(api, count)
{
	struct mr unread = WATCH(0, 1, 1), quiet = WATCH(1, 1, 2);

	UNMAP(0, 1);
	EXPECT_EQ(0, mr_destroy(self->notify.ctx, &unread));
	EXPECT_EQ(0, mr_destroy(self->notify.ctx, &quiet));
	self->notify.seen++;
	EXPECT_QUIET(&self->notify);
	UNMAP(1, 1);
	EXPECT_QUIET(&self->notify);
}

/* Of one MR, not of its cookie or queue; its end takes its own event only. */
TEST_F(api, count_of_overlapping_mrs)
{
	struct mr mrs[] = { WATCH(0, 4, COOKIE), WATCH(0, 4, COOKIE),
			    WATCH(0, 4, COOKIE), WATCH(1, 1, COOKIE) };
	struct ib_uverbs_mmu_notify_event e[5];
	int ctx = self->notify.ctx;

	UNMAP(0, 1);
	EXPECT_EQ(3, events_read(&self->notify, e, 5));
	UNMAP(1, 1);
	EXPECT_EQ(1, mr_destroy(ctx, &mrs[1]));
	EXPECT_EQ(3, events_read(&self->notify, e, 5));
	UNMAP(2, 1);
	EXPECT_EQ(2, events_read(&self->notify, e, 5));
	EXPECT_EQ(3, mr_destroy(ctx, &mrs[0]));
	EXPECT_EQ(3, mr_destroy(ctx, &mrs[2]));
	EXPECT_EQ(1, mr_destroy(ctx, &mrs[3]));
}

/* MR_DESTROY as it was before there was a count. */
TEST_F(api, destroy_without_count)
{
	struct mr mr = WATCH(0, 2, COOKIE);
	struct call call;

	UNMAP(0, 1);
	self->notify.seen++;
	call_init(&call, UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY);
	call_attr(&call, UVERBS_ATTR_DESTROY_MR_HANDLE, 0, mr.handle);
	ASSERT_EQ(0, call_make(&call, self->notify.ctx));
	UNMAP(1, 1);
	EXPECT_QUIET(&self->notify);
}

/* The command that is older than MR_DESTROY ends the watch as well. */
TEST_F(api, dereg_by_command)
{
	struct mr mr = WATCH(0, 2, COOKIE);
	struct ib_uverbs_dereg_mr in = { .mr_handle = mr.handle };

	UNMAP(0, 1);
	self->notify.seen++;
	ASSERT_EQ(0, command(self->notify.ctx, IB_USER_VERBS_CMD_DEREG_MR, &in,
			     sizeof(in), NULL, 0));
	UNMAP(1, 1);
	EXPECT_QUIET(&self->notify);
}

/* Watched or not, REG_MR fills in what QUERY_MR tells. */
TEST_F(api, query)
{
	struct mr plain = MR(1, 2), mrs[] = { WATCH(0, 2, COOKIE), plain };
	struct call call;
	size_t i;

	mr_call(&call, &mrs[1]);
	ASSERT_EQ(0, mr_make(&call, self->notify.ctx, &mrs[1]));
	for (i = 0; i < ARRAY_SIZE(mrs); i++) {
		uint64_t length = 0, iova = 0;
		uint32_t lkey, rkey;

		call_init(&call, UVERBS_OBJECT_MR, UVERBS_METHOD_QUERY_MR);
		call_attr(&call, UVERBS_ATTR_QUERY_MR_HANDLE, 0, mrs[i].handle);
		call_out(&call, UVERBS_ATTR_QUERY_MR_RESP_LKEY, &lkey, 4);
		call_out(&call, UVERBS_ATTR_QUERY_MR_RESP_RKEY, &rkey, 4);
		call_out(&call, UVERBS_ATTR_QUERY_MR_RESP_LENGTH, &length, 8);
		call_out(&call, UVERBS_ATTR_QUERY_MR_RESP_IOVA, &iova, 8);
		ASSERT_EQ(0, call_make(&call, self->notify.ctx));
		EXPECT_EQ(mrs[i].length, length);
		EXPECT_EQ(mrs[i].addr, iova);
		EXPECT_EQ(mrs[i].keys[0], lkey);
		EXPECT_EQ(mrs[i].keys[1], rkey);
	}
}

TEST_F(api, two_mrs_in_one_munmap)
{
	struct ib_uverbs_mmu_notify_event e[3];

	WATCH(0, 2, 1);
	WATCH(3, 3, 2);
	UNMAP(1, 4);
	ASSERT_EQ(2, events_read(&self->notify, e, 3));
	if (e[0].cookie == 2) {
		e[2] = e[0];
		e[0] = e[1];
		e[1] = e[2];
	}
	EXPECT_EQ(1, e[0].cookie);
	EXPECT_EQ((uintptr_t)PAGE(1), e[0].start);
	EXPECT_EQ((uintptr_t)PAGE(2), e[0].end);
	EXPECT_EQ(UNMAPPED, e[0].reasons);
	EXPECT_EQ(2, e[1].cookie);
	EXPECT_EQ((uintptr_t)PAGE(3), e[1].start);
	EXPECT_EQ((uintptr_t)PAGE(5), e[1].end);
	EXPECT_EQ(UNMAPPED, e[1].reasons);
	/* A bump for each, in either order. */
	EXPECT_EQ(self->notify.seen + 2, generation(&self->notify));
	EXPECT_EQ(2 * self->notify.seen + 3, e[0].generation + e[1].generation);
	EXPECT_NE(e[0].generation, e[1].generation);
}

/* MRs may overlap, and share a cookie. */
TEST_F(api, one_mr_inside_another)
{
	struct ib_uverbs_mmu_notify_event e[3];
	int i;

	WATCH(0, 6, COOKIE);
	WATCH(2, 2, COOKIE);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
	UNMAP(2, 1);
	ASSERT_EQ(2, events_read(&self->notify, e, 3));
	for (i = 0; i < 2; i++) {
		EXPECT_EQ(COOKIE, e[i].cookie);
		EXPECT_EQ((uintptr_t)PAGE(2), e[i].start);
		EXPECT_EQ((uintptr_t)PAGE(3), e[i].end);
		EXPECT_EQ(UNMAPPED, e[i].reasons);
	}
}

TEST_F(api, two_contexts)
{
	struct notify other;
	struct mr mr;

	notify_open(_metadata, &other);
	WATCH(0, 2, 1);
	mr = mr_of(&other, PAGE(1), 2 * self->page);
	ASSERT_EQ(0, mr_watch(other.ctx, &mr, other.queue, 2));

	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, 1, PAGE(0), PAGE(1), UNMAPPED, 1);
	EXPECT_QUIET(&other);
	UNMAP(1, 1);
	EXPECT_EVENT(&self->notify, 1, PAGE(1), PAGE(2), UNMAPPED, 1);
	EXPECT_EVENT(&other, 2, PAGE(1), PAGE(2), UNMAPPED, 1);
	UNMAP(2, 1);
	EXPECT_QUIET(&self->notify);
	EXPECT_EVENT(&other, 2, PAGE(2), PAGE(3), UNMAPPED, 1);
}

/* The second one is not mapped, and works without. */
TEST_F(api, two_queues_of_one_context)
{
	struct ib_uverbs_mmu_notify_event e[2];
	struct notify other = self->notify;
	struct mr mr = MR(1, 1);

	other.queue = queue_alloc(self->notify.ctx);
	ASSERT_LE(0, other.queue);
	ASSERT_EQ(0, fcntl(other.queue, F_SETFL, O_NONBLOCK));
	WATCH(0, 1, 1);
	ASSERT_EQ(0, mr_watch(self->notify.ctx, &mr, other.queue, 2));
	UNMAP(1, 1);
	EXPECT_QUIET(&self->notify);
	ASSERT_EQ(1, events_read(&other, e, 2));
	EXPECT_EQ(2, e[0].cookie);
	EXPECT_EQ((uintptr_t)PAGE(1), e[0].start);
	EXPECT_EQ((uintptr_t)PAGE(2), e[0].end);
	EXPECT_EQ(UNMAPPED, e[0].reasons);
	EXPECT_EQ(1, e[0].generation);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, 1, PAGE(0), PAGE(1), UNMAPPED, 1);
	EXPECT_EQ(-EAGAIN, events_read(&other, e, 2));
}

/* poll() tells, and the end of the context is an event of its own. */
TEST_F(api, end_of_context)
{
	struct pollfd fd = { .fd = self->notify.queue, .events = POLLIN };
	struct ib_uverbs_mmu_notify_event e;

	WATCH(0, 2, COOKIE);
	EXPECT_EQ(0, poll(&fd, 1, 0));
	UNMAP(0, 1);
	EXPECT_EQ(1, poll(&fd, 1, 0));
	EXPECT_EQ(POLLIN, fd.revents);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
	EXPECT_EQ(0, poll(&fd, 1, 0));

	close(self->notify.ctx);
	self->notify.ctx = -1;
	EXPECT_EQ(self->notify.seen + 1, generation(&self->notify));
	EXPECT_EQ(1, poll(&fd, 1, 0));
	EXPECT_EQ(POLLERR, fd.revents);
	EXPECT_EQ(-EIO, events_read(&self->notify, &e, 1));
	UNMAP(1, 1);
	EXPECT_EQ(self->notify.seen + 1, generation(&self->notify));
}

/*
 * Registrations that the pin itself makes stale, and say so
 */

FIXTURE(born)
{
	struct notify notify;
	size_t page;
	char *map;
	pid_t child;
};

FIXTURE_VARIANT(born)
{
	bool write, forked, read;	/* before the registration */
	uint64_t access;
	bool stale;
};

FIXTURE_VARIANT_ADD(born, ordinary) {
	.write = true, .access = MR_WRITE,
};

FIXTURE_VARIANT_ADD(born, ordinary_read_only) {
	.write = true, .access = MR_READ,
};

FIXTURE_VARIANT_ADD(born, untouched) {
	.access = MR_WRITE,
};

/* The pin finds the zero page. */
FIXTURE_VARIANT_ADD(born, untouched_read_only) {
	.access = MR_READ, .stale = true,
};

FIXTURE_VARIANT_ADD(born, zero_page) {
	.read = true, .access = MR_WRITE, .stale = true,
};

FIXTURE_VARIANT_ADD(born, zero_page_read_only) {
	.read = true, .access = MR_READ, .stale = true,
};

FIXTURE_VARIANT_ADD(born, forked) {
	.write = true, .forked = true, .access = MR_WRITE, .stale = true,
};

FIXTURE_VARIANT_ADD(born, forked_read_only) {
	.write = true, .forked = true, .access = MR_READ, .stale = true,
};

FIXTURE_SETUP(born)
{
	int i;

	notify_open(_metadata, &self->notify);
	self->page = getpagesize();
	self->map = mmap(NULL, LEN(2), PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, self->map);
	for (i = 0; i < 2; i++) {
		if (variant->write)
			__atomic_store_n(PAGE(i), 0x5a, __ATOMIC_RELAXED);
		if (variant->read)
			ASSERT_EQ(0, __atomic_load_n(PAGE(i), __ATOMIC_RELAXED));
	}
	if (variant->write)
		ASSERT_EQ(0, mr_settle(self->notify.ctx, MR(0, 2)));
	if (variant->forked) {
		self->child = fork();
		if (!self->child)
			pause();
		ASSERT_LT(0, self->child);
	}
}

FIXTURE_TEARDOWN(born)
{
	if (variant->forked) {
		kill(self->child, SIGKILL);
		child_wait(self->child);
	}
	notify_close(&self->notify);
}

/* A second registration does not find anything to replace. */
TEST_F(born, registered)
{
	struct mr mr = MR(0, 2), again;
	int ctx = self->notify.ctx, queue = self->notify.queue;

	mr.access = variant->access;
	again = mr;
	ASSERT_EQ(0, mr_watch(ctx, &mr, queue, COOKIE));
	if (variant->stale)
		EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(2),
			     MAYBE_STALE, 1);
	ASSERT_EQ(0, mr_watch(ctx, &again, queue, COOKIE));
	EXPECT_QUIET(&self->notify);
	EXPECT_EQ(variant->stale, mr_destroy(ctx, &mr));
	EXPECT_EQ(0, mr_destroy(ctx, &again));
}

/*
 * read()
 */

/* MRs of eight bytes each, with their numbers as cookies, all hit. */
static void hit(struct __test_metadata *_metadata, struct notify *notify,
		struct mr *mrs, int count)
{
	int pages = count * 8 / getpagesize() + 1, i;
	char *map = pages_map(_metadata, notify, pages);

	for (i = 0; i < count; i++) {
		mrs[i] = mr_of(notify, map + i * 8, 8);
		ASSERT_EQ(0, mr_watch(notify->ctx, &mrs[i], notify->queue, i));
	}
	ASSERT_EQ(0, munmap(map, pages * getpagesize()));
	EXPECT_EQ(notify->seen + count, generation(notify));
}

/*
 * Each of @mrs has its event exactly once, in the @read ones at @events or still
 * in the queue, and the counts agree.
 */
static void expect_all(struct __test_metadata *_metadata, struct notify *notify,
		       const void *events, int read, struct mr *mrs, int count)
{
	struct ib_uverbs_mmu_notify_event *all = calloc(count + 1, RECORD);
	int i, left, *seen = calloc(count, sizeof(*seen));

	ASSERT_TRUE(all && seen);
	memcpy(all, events, read * RECORD);
	left = events_read(notify, all + read, count + 1 - read);
	EXPECT_EQ(read < count ? count - read : -EAGAIN, left);
	for (i = 0; i < count; i++) {
		ASSERT_GT(count, all[i].cookie);
		EXPECT_EQ(1, ++seen[all[i].cookie]);
		EXPECT_EQ(mrs[all[i].cookie].addr, all[i].start);
		EXPECT_EQ(UNMAPPED, all[i].reasons);
	}
	for (i = 0; i < count; i++)
		EXPECT_EQ(1, mr_destroy(notify->ctx, &mrs[i]));
}

#define EXPECT_ALL(events, read, mrs, count) \
	expect_all(_metadata, &self->notify, events, read, mrs, count)

TEST_F(api, read_empty)
{
	struct ib_uverbs_mmu_notify_event e[2];
	struct mr mr[1];

	EXPECT_EQ(-EAGAIN, events_read(&self->notify, e, 2));
	hit(_metadata, &self->notify, mr, 1);
	EXPECT_EQ(1, events_read(&self->notify, e, 2));
	EXPECT_EQ(-EAGAIN, events_read(&self->notify, e, 2));
}

/* Full as long as there is something; the kernel copies 16 at a time. */
TEST_F(api, read_batches)
{
	const int sizes[][2] = {
		{ 40, 7 }, { 40, 17 }, { 40, 40 }, { 40, 41 }, { 32, 16 }
	};
	struct ib_uverbs_mmu_notify_event e[41 + 40];
	struct mr mrs[40];
	size_t i;

	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		int count = sizes[i][0], room = sizes[i][1], read = 0, got;

		self->notify.seen = generation(&self->notify);
		hit(_metadata, &self->notify, mrs, count);
		do {
			int left = count - read;

			got = events_read(&self->notify, e + read, room);
			EXPECT_EQ(left ? (left < room ? left : room) : -EAGAIN,
				  got);
			read += got > 0 ? got : 0;
		} while (got == room);
		ASSERT_EQ(count, read);
		EXPECT_ALL(e, read, mrs, count);
	}
}

/* Whole records only; what is behind them is left alone. */
TEST_F(api, read_whole_records)
{
	struct mr mrs[3];
	size_t i;

	hit(_metadata, &self->notify, mrs, 3);
	memset(self->map, 0xee, self->page);
	EXPECT_EQ(2 * RECORD, read(self->notify.queue, self->map, 3 * RECORD - 1));
	for (i = 2 * RECORD; i < 3 * RECORD; i++)
		EXPECT_EQ(0xee, (unsigned char)self->map[i]);
	EXPECT_ALL(self->map, 2, mrs, 3);
}

TEST_F(api, read_buffer_too_small)
{
	const size_t sizes[] = { 0, 1, RECORD - 1 };
	struct mr mrs[2];
	size_t i;

	hit(_metadata, &self->notify, mrs, 2);
	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		EXPECT_EQ(-1, read(self->notify.queue, self->map, sizes[i]));
		EXPECT_EQ(EINVAL, errno);
	}
	EXPECT_ALL(NULL, 0, mrs, 2);
	EXPECT_EQ(-1, read(self->notify.queue, self->map, RECORD - 1));
	EXPECT_EQ(EINVAL, errno);
}

/* What faults consumes nothing. */
TEST_F(api, read_buffer_faults)
{
	char *const buffers[] = {
		PAGE(0),	/* not mapped */
		PAGE(1),	/* not accessible */
		PAGE(2),	/* not writable */
		(char *)-0x10000L,	/* the kernel's */
	};
	struct mr mrs[20];
	size_t i, room;

	UNMAP(0, 1);
	ASSERT_EQ(0, mprotect(PAGE(1), self->page, PROT_NONE));
	ASSERT_EQ(0, mprotect(PAGE(2), self->page, PROT_READ));
	hit(_metadata, &self->notify, mrs, 20);
	for (i = 0; i < ARRAY_SIZE(buffers); i++) {
		for (room = 1; room <= 20; room += 19) {
			EXPECT_EQ(-1, read(self->notify.queue, buffers[i],
					   room * RECORD));
			EXPECT_EQ(EFAULT, errno);
		}
	}
	EXPECT_EQ(self->notify.seen + 20, generation(&self->notify));
	EXPECT_ALL(NULL, 0, mrs, 20);
}

/* The records before a fault are read, the rest stays. */
TEST_F(api, read_buffer_faults_half_way)
{
	const size_t rooms[] = {
		5 * RECORD,		/* between records */
		5 * RECORD + 13,	/* in a record */
		RECORD - 1,		/* in the first */
		33 * RECORD + 1,	/* after two batches of the kernel's */
	};
	struct mr mrs[40];
	size_t i;

	for (i = 0; i < ARRAY_SIZE(rooms); i++) {
		int whole = rooms[i] / RECORD;
		char *map, *buffer;
		ssize_t got;

		/* Pages that the kernel has to fault in, then one it cannot. */
		map = mmap(NULL, 2 * self->page, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		ASSERT_NE(MAP_FAILED, map);
		ASSERT_EQ(0, mprotect(map + self->page, self->page, PROT_NONE));
		buffer = map + self->page - rooms[i];

		self->notify.seen = generation(&self->notify);
		hit(_metadata, &self->notify, mrs, 40);
		got = read(self->notify.queue, buffer, 40 * RECORD);
		if (whole) {
			EXPECT_EQ(whole * RECORD, got);
		} else {
			EXPECT_EQ(-1, got);
			EXPECT_EQ(EFAULT, errno);
		}
		EXPECT_ALL(buffer, whole, mrs, 40);
	}
}

/* A read() for each segment. */
TEST_F(api, readv)
{
	struct ib_uverbs_mmu_notify_event e[3];
	struct iovec iov[] = { { &e[0], RECORD }, { &e[1], 2 * RECORD } };
	struct mr mrs[2];

	hit(_metadata, &self->notify, mrs, 2);
	EXPECT_EQ(2 * RECORD, readv(self->notify.queue, iov, 2));
	EXPECT_ALL(e, 2, mrs, 2);
}

/* Pages that the kernel has to fault in are no reason for a short count. */
TEST_F(api, read_buffer_not_populated)
{
	const int count = 3 * self->page / RECORD;
	struct mr *mrs = calloc(count, sizeof(*mrs));
	char *buffer;

	ASSERT_NE(NULL, mrs);
	hit(_metadata, &self->notify, mrs, count);
	buffer = mmap(NULL, 3 * self->page, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, buffer);
	EXPECT_EQ(count * RECORD,
		  read(self->notify.queue, buffer, 3 * self->page));
	EXPECT_ALL(buffer, count, mrs, count);
}

TEST_F(api, no_write_and_no_position)
{
	struct mr mr[1];

	hit(_metadata, &self->notify, mr, 1);
	EXPECT_EQ(-1, write(self->notify.queue, self->map, RECORD));
	EXPECT_EQ(EBADF, errno);
	EXPECT_EQ(-1, lseek(self->notify.queue, 0, SEEK_SET));
	EXPECT_EQ(ESPIPE, errno);
	EXPECT_EQ(-1, pread(self->notify.queue, self->map, RECORD, 0));
	EXPECT_EQ(ESPIPE, errno);
	EXPECT_ALL(NULL, 0, mr, 1);
}

/*
 * Who waits
 */

/* A thread that waits for an event, to read it or to know of it. */
struct sleeper {
	struct notify *notify;
	bool polls;
	pthread_t thread;
	pid_t tid;
	int result;
};

static void *sleeper_run(void *arg)
{
	struct sleeper *sleeper = arg;
	struct pollfd fd = { .fd = sleeper->notify->queue, .events = POLLIN };
	struct ib_uverbs_mmu_notify_event e;

	__atomic_store_n(&sleeper->tid, syscall(SYS_gettid), __ATOMIC_RELEASE);
	if (sleeper->polls)
		sleeper->result = ppoll(&fd, 1, NULL, NULL) < 0 ? -errno : fd.revents;
	else
		sleeper->result = events_read(sleeper->notify, &e, 1);
	return NULL;
}

/* Returns when the thread sleeps in its system call. */
static void sleeper_start(struct __test_metadata *_metadata,
			  struct sleeper *sleeper)
{
	const long call = sleeper->polls ? SYS_ppoll : SYS_read;
	char path[64];
	FILE *file;
	pid_t tid;
	long nr;

	sleeper->tid = 0;
	ASSERT_EQ(0, pthread_create(&sleeper->thread, NULL, sleeper_run,
				    sleeper));
	while (!(tid = __atomic_load_n(&sleeper->tid, __ATOMIC_ACQUIRE)))
		sched_yield();
	snprintf(path, sizeof(path), "/proc/self/task/%d/syscall", tid);
	do {
		sched_yield();
		/* "running", or the number of the call. */
		nr = -1;
		file = fopen(path, "r");
		ASSERT_NE(NULL, file);
		if (fscanf(file, "%ld", &nr) != 1)
			nr = -1;
		fclose(file);
	} while (nr != call);
}

static void expect_woken(struct __test_metadata *_metadata,
			 struct sleeper *sleeper, int result)
{
	ASSERT_EQ(0, pthread_join(sleeper->thread, NULL));
	EXPECT_EQ(result, sleeper->result);
}

/* By an event, and by the end of all events. */
TEST_F(api, read_woken)
{
	struct sleeper sleeper = { .notify = &self->notify };

	WATCH(0, 2, COOKIE);
	ASSERT_EQ(0, fcntl(self->notify.queue, F_SETFL, 0));
	sleeper_start(_metadata, &sleeper);
	UNMAP(0, 1);
	expect_woken(_metadata, &sleeper, 1);

	sleeper_start(_metadata, &sleeper);
	close(self->notify.ctx);
	self->notify.ctx = -1;
	expect_woken(_metadata, &sleeper, -EIO);
}

TEST_F(api, poll_woken)
{
	struct sleeper sleeper = { .notify = &self->notify, .polls = true };
	struct ib_uverbs_mmu_notify_event e;

	WATCH(0, 2, COOKIE);
	sleeper_start(_metadata, &sleeper);
	UNMAP(0, 1);
	expect_woken(_metadata, &sleeper, POLLIN);
	EXPECT_EQ(1, events_read(&self->notify, &e, 1));

	sleeper_start(_metadata, &sleeper);
	close(self->notify.ctx);
	self->notify.ctx = -1;
	expect_woken(_metadata, &sleeper, POLLERR);
}

/*
 * The counter page
 */

TEST_F(api, page_mmap)
{
	const int rw = PROT_READ | PROT_WRITE, rx = PROT_READ | PROT_EXEC;
	const size_t page = self->page;
	const struct {
		size_t len;
		int prot, flags;
		off_t offset;
		int err;
	} refused[] = {
		{ 2 * page, PROT_READ, MAP_SHARED, 0, EINVAL },
		{ page + 1, PROT_READ, MAP_SHARED, 0, EINVAL },
		{ page, PROT_READ, MAP_SHARED, page, EINVAL },
		{ page, PROT_READ, MAP_SHARED, 1LL << 40, EINVAL },
		{ page, PROT_READ, MAP_PRIVATE, 0, EINVAL },
		{ page, rw, MAP_PRIVATE, 0, EINVAL },
		{ page, rw, MAP_SHARED, 0, EACCES },
		{ page, PROT_WRITE, MAP_SHARED, 0, EACCES },
		{ page, rx, MAP_SHARED, 0, EPERM },
	};
	size_t i;

	for (i = 0; i < ARRAY_SIZE(refused); i++) {
		EXPECT_EQ(MAP_FAILED, mmap(NULL, refused[i].len,
					   refused[i].prot, refused[i].flags,
					   self->notify.queue,
					   refused[i].offset)) {
			TH_LOG("case %zu", i);
		}
		EXPECT_EQ(refused[i].err, errno) {
			TH_LOG("case %zu", i);
		}
	}
	/* A part of a page is the page. */
	EXPECT_NE(MAP_FAILED, mmap(NULL, 8, PROT_READ, MAP_SHARED,
				   self->notify.queue, 0));
}

TEST_F(api, page_cannot_be_changed)
{
	void *page = (void *)self->notify.page;

	EXPECT_EQ(-1, mprotect(page, self->page, PROT_READ | PROT_WRITE));
	EXPECT_EQ(EACCES, errno);
	EXPECT_EQ(-1, mprotect(page, self->page, PROT_READ | PROT_EXEC));
	EXPECT_EQ(EACCES, errno);
	EXPECT_EQ(MAP_FAILED, mremap(page, self->page, 2 * self->page, 0));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_EQ(0, generation(&self->notify));
}

TEST_F(api, page_survives_dontneed)
{
	uint64_t i;

	WATCH(0, 2, COOKIE);
	for (i = 0; i < 3; i++) {
		EXPECT_EQ(i, generation(&self->notify));
		ASSERT_EQ(0, madvise((void *)self->notify.page, self->page,
				     MADV_DONTNEED));
		EXPECT_EQ(i, generation(&self->notify));
		if (i < 2)
			UNMAP(i, 1);
	}
}

TEST_F(api, page_mapped_twice)
{
	struct notify other = self->notify;

	other.page = mmap(NULL, self->page, PROT_READ, MAP_SHARED,
			  self->notify.queue, 0);
	ASSERT_NE(MAP_FAILED, other.page);
	WATCH(0, 1, COOKIE);
	UNMAP(0, 1);
	EXPECT_EQ(1, generation(&self->notify));
	EXPECT_EQ(1, generation(&other));
}

TEST_F(api, page_gone_in_child)
{
	pid_t child = fork();

	if (!child)
		_exit(generation(&self->notify));
	EXPECT_EQ(-SIGSEGV, child_wait(child));
	EXPECT_QUIET(&self->notify);
}

/*
 * Another process, with another address space
 */

TEST_F(api, read_by_child)
{
	struct ib_uverbs_mmu_notify_event e;
	pid_t child;
	int i;
	struct mr mr = WATCH(0, 1, COOKIE);

	for (i = 0; i < 2; i++) {
		child = fork();
		if (!child)
			_exit(-events_read(&self->notify, &e, 1));
		EXPECT_EQ(EPERM, child_wait(child));
		if (!i)
			UNMAP(0, 1);
	}
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
	EXPECT_EQ(1, mr_destroy(self->notify.ctx, &mr));
}

TEST_F(api, registration_by_child)
{
	struct mr mr = MR(0, 1);
	pid_t child = fork();

	if (!child)
		_exit(-mr_watch(self->notify.ctx, &mr, self->notify.queue,
				COOKIE));
	EXPECT_EQ(EPERM, child_wait(child));
	EXPECT_QUIET(&self->notify);
	/* The pin may have to replace a page that a child had a part in. */
	ASSERT_EQ(0, mr_settle(self->notify.ctx, mr));
	WATCH(0, 1, COOKIE);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED, 1);
}

/* Not what vfork() makes: that has the same. */
TEST_F(api, vfork_child)
{
	struct ib_uverbs_mmu_notify_event e;
	struct mr mr = MR(0, 1);
	pid_t child = vfork();

	if (!child) {
		if (mr_watch(self->notify.ctx, &mr, self->notify.queue, COOKIE))
			_exit(1);
		if (munmap(PAGE(0), self->page))
			_exit(2);
		_exit(events_read(&self->notify, &e, 1) != 1);
	}
	EXPECT_EQ(0, child_wait(child));
	self->notify.seen++;
	EXPECT_QUIET(&self->notify);
	EXPECT_EQ(1, mr_destroy(self->notify.ctx, &mr));
}

/*
 * The extended commands
 */

#define EX_COMMAND(name) \
	(IB_USER_VERBS_EX_CMD_##name | IB_USER_VERBS_CMD_FLAG_EXTENDED)

TEST_F(api, commands)
{
	struct ib_uverbs_ex_create_mmu_notify create = {};
	struct ib_uverbs_ex_create_mmu_notify_resp created = {};
	struct ib_uverbs_ex_reg_mr_notify reg = {
		.pd_handle = self->notify.pd,
		.start = (uintptr_t)PAGE(0),
		.length = LEN(2),
		.hca_va = (uintptr_t)PAGE(0),
		.cookie = COOKIE,
		.access_flags = MR_WRITE,
	};
	struct ib_uverbs_ex_reg_mr_notify_resp registered = {};
	struct ib_uverbs_ex_dereg_mr_notify dereg = {};
	struct ib_uverbs_ex_dereg_mr_notify_resp deregistered = {};
	struct ib_uverbs_mmu_notify_event e[2];
	struct notify other = self->notify;
	struct call call;

	ASSERT_EQ(0, command(other.ctx, EX_COMMAND(CREATE_MMU_NOTIFY), &create,
			     sizeof(create), &created, sizeof(created)));
	EXPECT_EQ(sizeof(created), created.response_length);
	other.queue = created.notify_fd;
	ASSERT_EQ(0, fcntl(other.queue, F_SETFL, O_NONBLOCK));

	reg.notify_fd = other.queue;
	call_init(&call, UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INVOKE_WRITE);
	call_attr(&call, UVERBS_ATTR_WRITE_CMD, sizeof(uint64_t),
		  EX_COMMAND(REG_MR_NOTIFY));
	call_attr(&call, UVERBS_ATTR_CORE_IN, sizeof(reg), (uintptr_t)&reg);
	call_out(&call, UVERBS_ATTR_CORE_OUT, &registered, sizeof(registered));
	call_siw(&call, sizeof(struct siw_ureq_reg_mr),
		 sizeof(struct siw_uresp_reg_mr));
	ASSERT_EQ(0, call_make(&call, other.ctx));
	EXPECT_EQ(sizeof(registered), registered.response_length);

	UNMAP(0, 1);
	ASSERT_EQ(1, events_read(&other, e, 2));
	EXPECT_EQ(COOKIE, e[0].cookie);
	EXPECT_EQ((uintptr_t)PAGE(0), e[0].start);
	EXPECT_EQ((uintptr_t)PAGE(1), e[0].end);
	EXPECT_EQ(UNMAPPED, e[0].reasons);
	EXPECT_EQ(1, e[0].generation);

	dereg.mr_handle = registered.mr_handle;
	dereg.comp_mask = 1;
	EXPECT_EQ(-EOPNOTSUPP,
		  command(other.ctx, EX_COMMAND(DEREG_MR_NOTIFY), &dereg,
			  sizeof(dereg), &deregistered, sizeof(deregistered)));
	dereg.comp_mask = 0;
	ASSERT_EQ(0, command(other.ctx, EX_COMMAND(DEREG_MR_NOTIFY), &dereg,
			     sizeof(dereg), &deregistered,
			     sizeof(deregistered)));
	EXPECT_EQ(1, deregistered.events_reported);
	UNMAP(1, 1);
	EXPECT_EQ(-EAGAIN, events_read(&other, e, 2));
	EXPECT_QUIET(&self->notify);
}

int main(int argc, char **argv)
{
	return notify_main(argc, argv);
}

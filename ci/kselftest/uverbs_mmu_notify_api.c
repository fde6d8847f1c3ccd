// SPDX-License-Identifier: GPL-2.0
/*
 * The interface of MMU notification: registration, events, read(), waiting, the
 * generation page, other processes, and the write() commands.
 */
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/prctl.h>
#include <sys/uio.h>

#include "uverbs_mmu_notify.h"

#define COOKIE	0x123456789abcdef0ULL
#define EVENT_SIZE	((int)sizeof(struct ib_uverbs_mmu_notify_event))

/* These flags have no name in the uapi headers. */
#define REREG_TRANS	1
#define REREG_PD	2
#define REREG_ACCESS	4

/* A context, and six pages without an MR. */
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

/* Registers a watched MR of these pages, which is not born stale. */
#define WATCH(from, n, cookie) ({					\
	struct mr _mr = MR(from, n);					\
									\
	ASSERT_EQ(0, mr_watch(self->notify.ctx, &_mr,			\
			      self->notify.fd, cookie));		\
	EXPECT_QUIET(&self->notify);					\
	_mr;								\
})

/* This is the only event, and the generation has advanced once, for it. */
#define EXPECT_EVENT(_notify, _cookie, from, to, _reasons) do {		\
	struct ib_uverbs_mmu_notify_event _e[2];			\
	struct notify *_n = (_notify);					\
	uint64_t _now = generation(_n);					\
									\
	ASSERT_EQ(1, events_drain(_n, _e, 2));				\
	EXPECT_EQ(_cookie, _e[0].cookie);				\
	EXPECT_EQ((uintptr_t)(from), _e[0].start);			\
	EXPECT_EQ((uintptr_t)(to), _e[0].end);				\
	EXPECT_EQ(_reasons, _e[0].reasons);				\
	EXPECT_EQ(_now, _e[0].generation);				\
	EXPECT_EQ(_n->seen + 1, _now);					\
	_n->seen = _now;						\
	EXPECT_QUIET(_n);						\
} while (0)

/*
 * Registration
 */

#define EXPECT_REFUSED(err, mr, fd) do {				\
	EXPECT_EQ(err, mr_watch(self->notify.ctx, mr, fd, COOKIE));	\
	EXPECT_QUIET(&self->notify);					\
} while (0)

/* Interface: GET_CONTEXT returns the support bit, and keeps the others. */
TEST_F(api, core_support)
{
	uint64_t core_support = 0;
	int ctx = context_open(&core_support);

	ASSERT_LE(0, ctx);
	EXPECT_TRUE(core_support & IB_UVERBS_CORE_SUPPORT_MMU_NOTIFY);
	EXPECT_TRUE(core_support & IB_UVERBS_CORE_SUPPORT_OPTIONAL_MR_ACCESS);
	close(ctx);
}

/* Interface: QUERY_CONTEXT returns the same bits if the driver has it. */
TEST_F(api, query_context)
{
	uint64_t got = 0, queried = 0;
	int ctx = context_open(&got), ret;
	uint32_t vectors;
	struct call call;

	ASSERT_LE(0, ctx);
	call_init(&call, UVERBS_OBJECT_DEVICE, UVERBS_METHOD_QUERY_CONTEXT);
	call_out(&call, UVERBS_ATTR_QUERY_CONTEXT_NUM_COMP_VECTORS, &vectors,
		 sizeof(vectors));
	call_out(&call, UVERBS_ATTR_QUERY_CONTEXT_CORE_SUPPORT, &queried,
		 sizeof(queried));
	ret = call_make(&call, ctx);
	if (ret == -EOPNOTSUPP)
		SKIP(return, "the driver does not implement QUERY_CONTEXT");
	ASSERT_EQ(0, ret);
	EXPECT_EQ(got, queried);
}

/* G3: One attribute without the other is refused. */
TEST_F(api, fd_without_cookie)
{
	struct mr mr = MR(0, 1);
	struct call call;

	mr_call_watched(&call, &mr, self->notify.fd, COOKIE);
	call.hdr.num_attrs--;
	EXPECT_EQ(-EINVAL, mr_make(&call, self->notify.ctx, &mr));
	EXPECT_QUIET(&self->notify);
}

/* G3: One attribute without the other is refused. */
TEST_F(api, cookie_without_fd)
{
	struct mr mr = MR(0, 1);
	struct call call;

	mr_call(&call, &mr);
	call_attr(&call, UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, 8, COOKIE);
	EXPECT_EQ(-EINVAL, mr_make(&call, self->notify.ctx, &mr));
	EXPECT_QUIET(&self->notify);
}

/* G3: The FD must belong to the context. */
TEST_F(api, fd_of_another_context)
{
	struct mr mr = MR(0, 1);
	struct notify other;

	notify_open(_metadata, &other);
	EXPECT_REFUSED(-EBADF, &mr, other.fd);
	EXPECT_QUIET(&other);
}

/* G3: The FD must be a notification FD. */
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

/* G3: The FD must be open. */
TEST_F(api, fd_that_is_not_open)
{
	int fd = dup(self->notify.fd);
	struct mr mr = MR(0, 1);

	ASSERT_EQ(0, close(fd));
	EXPECT_REFUSED(-EBADF, &mr, fd);
	EXPECT_REFUSED(-EBADF, &mr, -1);
	EXPECT_REFUSED(-EINVAL, &mr, 1LL << 32);
}

/* G3: An empty range is refused. */
TEST_F(api, zero_length)
{
	struct mr mr = MR(0, 0);

	EXPECT_REFUSED(-EINVAL, &mr, self->notify.fd);
}

/* G3: A range that wraps around is refused. */
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
		EXPECT_REFUSED(-EINVAL, &mr, self->notify.fd);
	}
}

/* G3: Invalid access flags are refused. */
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
		EXPECT_REFUSED(-EINVAL, &mr, self->notify.fd);
	}
}

/* G3: ODP MRs track the mapping themselves, and cannot be watched. */
TEST_F(api, on_demand_paging)
{
	struct mr mr = MR(0, 1);
	struct call call;

	mr.access |= IB_UVERBS_ACCESS_ON_DEMAND;
	mr_call(&call, &mr);
	if (mr_make(&call, self->notify.ctx, &mr))
		SKIP(return, "the device has no on-demand paging");
	EXPECT_REFUSED(-EOPNOTSUPP, &mr, self->notify.fd);
}

/* G3: No event for a registration that fails in the driver. */
TEST_F(api, memory_that_cannot_be_pinned)
{
	struct mr mr = MR(0, 2);

	UNMAP(1, 1);
	EXPECT_REFUSED(-EFAULT, &mr, self->notify.fd);
	UNMAP(0, 1);
	EXPECT_QUIET(&self->notify);
}

/*
 * G3: No event for a registration that fails after the pin, even if the MR was
 * born stale.
 */
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
			mr_call_watched(&call, &mrs[i], self->notify.fd,
					COOKIE);
			call.hdr.attrs[6 + key].data = 8;	/* not mapped */
			EXPECT_EQ(-EFAULT, call_make(&call, self->notify.ctx));
		}
	}
	UNMAP(0, 1);
	ASSERT_EQ(0, munmap(zero, self->page));
	EXPECT_QUIET(&self->notify);
}

/* Interface: An unknown attribute is refused if it is mandatory. */
TEST_F(api, unknown_attribute)
{
	struct ib_uverbs_attr *attr;
	struct mr mr = MR(0, 1);
	struct call call;

	mr_call_watched(&call, &mr, self->notify.fd, COOKIE);
	call_attr(&call, 31, 8, 0);
	EXPECT_EQ(-EPROTONOSUPPORT, mr_make(&call, self->notify.ctx, &mr));
	EXPECT_QUIET(&self->notify);

	mr_call_watched(&call, &mr, self->notify.fd, COOKIE);
	attr = call_attr(&call, 31, 8, 0);
	attr->flags = 0;
	ASSERT_EQ(0, mr_make(&call, self->notify.ctx, &mr));
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
}

/* G3: Attributes of the wrong length, with reserved bits, or given twice. */
TEST_F(api, malformed_attributes)
{
	const struct {
		struct ib_uverbs_attr fd, cookie;
	} wrong[] = {
		{ { .len = 8 }, { .len = 8 } },
		{ { .attr_data.reserved = 1 }, { .len = 8 } },
		{ { .len = 0 }, { .len = 4 } },
		{ { .len = 0 }, { .len = 16 } },	/* a pointer */
		{ { .len = 0 }, { .len = 8, .attr_data.reserved = 1 } },
		{ { .len = 0 }, { .len = 8, .attr_id = UVERBS_ATTR_REG_MR_NOTIFY_FD } },
	};
	struct ib_uverbs_attr *fd, *cookie;
	struct mr mr = MR(0, 1);
	struct call call;
	size_t i;

	for (i = 0; i < ARRAY_SIZE(wrong); i++) {
		mr_call_watched(&call, &mr, self->notify.fd,
				(uintptr_t)self->map);
		cookie = &call.hdr.attrs[call.hdr.num_attrs - 1];
		fd = cookie - 1;
		fd->len = wrong[i].fd.len;
		fd->attr_data = wrong[i].fd.attr_data;
		cookie->len = wrong[i].cookie.len;
		cookie->attr_data = wrong[i].cookie.attr_data;
		if (wrong[i].cookie.attr_id)
			call_attr(&call, UVERBS_ATTR_REG_MR_NOTIFY_FD, 0,
				  self->notify.fd);
		EXPECT_EQ(-EINVAL, mr_make(&call, self->notify.ctx, &mr)) {
			TH_LOG("case %zu", i);
		}
	}
	EXPECT_QUIET(&self->notify);
	WATCH(0, 1, COOKIE);
}

/* G1: A watched MR cannot be replaced by an unwatched one. */
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

	/* The first MR is still watched. */
	UNMAP(0, 2);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
	EXPECT_EQ(1, mr_destroy(self->notify.ctx, &mr));
	EXPECT_EQ(0, mr_destroy(self->notify.ctx, &plain));
}

/* G3: Failed registrations do not affect other MRs. */
TEST_F(api, failed_registrations)
{
	struct mr empty = MR(0, 0), unmapped = MR(0, 1);
	int i;

	unmapped.addr = 0;
	WATCH(0, 2, COOKIE);
	for (i = 0; i < 50; i++) {
		EXPECT_REFUSED(-EINVAL, &empty, self->notify.fd);
		EXPECT_REFUSED(-EFAULT, &unmapped, self->notify.fd);
	}
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
	UNMAP(1, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(1), PAGE(2), UNMAPPED);
}

/*
 * Events
 */

/* G1: The range is clipped to the MR, which need not be page-aligned. */
TEST_F(api, clip_to_unaligned_mr)
{
	char *start = PAGE(0) + 100, *end = PAGE(2) + 200;
	struct mr mr = mr_of(&self->notify, start, end - start);

	ASSERT_EQ(0, mr_watch(self->notify.ctx, &mr, self->notify.fd, COOKIE));
	UNMAP(2, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(2), end, UNMAPPED);
	UNMAP(0, 2);
	EXPECT_EVENT(&self->notify, COOKIE, start, PAGE(2), UNMAPPED);
}

/* G1: Events have CPU addresses, not iovas. */
TEST_F(api, events_have_cpu_addresses)
{
	struct mr mr = MR(1, 2);
	struct call call;

	mr_call_watched(&call, &mr, self->notify.fd, COOKIE);
	call.hdr.attrs[2].data = LEN(1000);
	ASSERT_EQ(0, mr_make(&call, self->notify.ctx, &mr));
	UNMAP(1, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(1), PAGE(2), UNMAPPED);
}

/* Let calls accept tagged addresses. Returns 0 or -1. */
static int tags_enable(void)
{
#ifdef __x86_64__
	/* ARCH_ENABLE_TAGGED_ADDR, with the six bits of LAM */
	return syscall(SYS_arch_prctl, 0x4002, 6);
#else
	return prctl(PR_SET_TAGGED_ADDR_CTRL, PR_TAGGED_ADDR_ENABLE, 0, 0, 0);
#endif
}

/* G1: The tag of an address is ignored, and events have none. */
TEST_F(api, tagged_address)
{
	struct mr mr = MR(0, 2);

	if (tags_enable())
		SKIP(return, "no tagged addresses: %s", strerror(errno));
	/* Part of the tag on each architecture that has one. */
	mr.addr |= 1ULL << 57;
	ASSERT_EQ(0, mr_watch(self->notify.ctx, &mr, self->notify.fd, COOKIE));
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
}

/* G2: The generation has advanced when the call returns, once per event. */
TEST_F(api, generation)
{
	char *map = pages_map(_metadata, &self->notify, 100);
	struct mr mr = mr_of(&self->notify, map, 100 * self->page);
	int i;

	ASSERT_EQ(0, mr_watch(self->notify.ctx, &mr, self->notify.fd, COOKIE));
	for (i = 0; i < 100; i++) {
		char *start = map + i * self->page, *end = start + self->page;

		ASSERT_EQ(0, munmap(start, self->page));
		ASSERT_EQ(self->notify.seen + 1, generation(&self->notify));
		EXPECT_EVENT(&self->notify, COOKIE, start, end, UNMAPPED);
	}
}

/*
 * G4: Invalidations merge into the pending event. It has the range and the
 * reasons of all of them, and the generation of the first.
 */
TEST_F(api, merge)
{
	struct mr mr = WATCH(0, 6, COOKIE);

	ASSERT_EQ(0, madvise(PAGE(1), self->page, MADV_DONTNEED));
	UNMAP(3, 2);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(1), PAGE(5),
		     UNMAPPED | MAYBE_STALE);

	/* A delivered event is not pending. */
	ASSERT_EQ(0, madvise(PAGE(2), self->page, MADV_DONTNEED));
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(2), PAGE(3), MAYBE_STALE);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
	/* A pending event is not counted. */
	UNMAP(5, 1);
	EXPECT_EQ(3, mr_destroy(self->notify.ctx, &mr));
	self->notify.seen++;
	EXPECT_QUIET(&self->notify);
}

/* G4: Merging does not advance the generation. The next event does. */
TEST_F(api, merge_keeps_generation)
{
	struct ib_uverbs_mmu_notify_event e[3];
	uint64_t seen = self->notify.seen;

	WATCH(0, 3, 1);
	WATCH(3, 3, 2);
	UNMAP(0, 1);
	EXPECT_EQ(seen + 1, generation(&self->notify));
	UNMAP(3, 1);
	EXPECT_EQ(seen + 2, generation(&self->notify));
	UNMAP(1, 1);
	ASSERT_EQ(0, madvise(PAGE(2), self->page, MADV_DONTNEED));
	UNMAP(4, 1);
	EXPECT_EQ(seen + 2, generation(&self->notify));

	ASSERT_EQ(2, events_drain(&self->notify, e, 3));
	EXPECT_EQ(1, e[0].cookie);
	EXPECT_EQ(seen + 1, e[0].generation);
	EXPECT_EQ((uintptr_t)PAGE(3), e[0].end);
	EXPECT_EQ(UNMAPPED | MAYBE_STALE, e[0].reasons);
	EXPECT_EQ(2, e[1].cookie);
	EXPECT_EQ(seen + 2, e[1].generation);
	EXPECT_EQ((uintptr_t)PAGE(5), e[1].end);
	EXPECT_EQ(UNMAPPED, e[1].reasons);

	self->notify.seen = seen + 2;
	UNMAP(2, 1);
	EXPECT_EVENT(&self->notify, 1, PAGE(2), PAGE(3), UNMAPPED);
}

/* G5: Deregistration drops a pending event and does not count it. */
TEST_F(api, pending_event_not_counted)
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

/* G5: The count is per MR, also if MRs share range, cookie and FD. */
TEST_F(api, count_of_overlapping_mrs)
{
	struct mr mrs[] = { WATCH(0, 4, COOKIE), WATCH(0, 4, COOKIE),
			    WATCH(0, 4, COOKIE), WATCH(1, 1, COOKIE) };
	struct ib_uverbs_mmu_notify_event e[5];
	int ctx = self->notify.ctx;

	UNMAP(0, 1);
	EXPECT_EQ(3, events_drain(&self->notify, e, 5));
	UNMAP(1, 1);
	EXPECT_EQ(1, mr_destroy(ctx, &mrs[1]));
	EXPECT_EQ(3, events_drain(&self->notify, e, 5));
	UNMAP(2, 1);
	EXPECT_EQ(2, events_drain(&self->notify, e, 5));
	EXPECT_EQ(3, mr_destroy(ctx, &mrs[0]));
	EXPECT_EQ(3, mr_destroy(ctx, &mrs[2]));
	EXPECT_EQ(1, mr_destroy(ctx, &mrs[3]));
}

/* G5: The count is optional. */
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

/* G5: The write() command that predates MR_DESTROY also stops the watch. */
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

/* Interface: REG_MR sets what QUERY_MR returns, watched or not. */
TEST_F(api, query_mr)
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

/* G1: Each MR in the range has its event, with a generation of its own. */
TEST_F(api, two_mrs_in_one_munmap)
{
	struct ib_uverbs_mmu_notify_event e[3];

	WATCH(0, 2, 1);
	WATCH(3, 3, 2);
	UNMAP(1, 4);
	ASSERT_EQ(2, events_drain(&self->notify, e, 3));
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
	/* The generation advances for each, in either order. */
	EXPECT_EQ(self->notify.seen + 2, generation(&self->notify));
	EXPECT_EQ(2 * self->notify.seen + 3, e[0].generation + e[1].generation);
	EXPECT_NE(e[0].generation, e[1].generation);
}

/* G1: MRs may overlap and share a cookie. */
TEST_F(api, one_mr_inside_another)
{
	struct ib_uverbs_mmu_notify_event e[3];
	int i;

	WATCH(0, 6, COOKIE);
	WATCH(2, 2, COOKIE);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
	UNMAP(2, 1);
	ASSERT_EQ(2, events_drain(&self->notify, e, 3));
	for (i = 0; i < 2; i++) {
		EXPECT_EQ(COOKIE, e[i].cookie);
		EXPECT_EQ((uintptr_t)PAGE(2), e[i].start);
		EXPECT_EQ((uintptr_t)PAGE(3), e[i].end);
		EXPECT_EQ(UNMAPPED, e[i].reasons);
	}
}

/* G1: An address range can be watched through several contexts. */
TEST_F(api, two_contexts)
{
	struct notify other;
	struct mr mr;

	notify_open(_metadata, &other);
	WATCH(0, 2, 1);
	mr = mr_of(&other, PAGE(1), 2 * self->page);
	ASSERT_EQ(0, mr_watch(other.ctx, &mr, other.fd, 2));

	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, 1, PAGE(0), PAGE(1), UNMAPPED);
	EXPECT_QUIET(&other);
	UNMAP(1, 1);
	EXPECT_EVENT(&self->notify, 1, PAGE(1), PAGE(2), UNMAPPED);
	EXPECT_EVENT(&other, 2, PAGE(1), PAGE(2), UNMAPPED);
	UNMAP(2, 1);
	EXPECT_QUIET(&self->notify);
	EXPECT_EVENT(&other, 2, PAGE(2), PAGE(3), UNMAPPED);
}

/* G1: A context can have several FDs. The page need not be mapped. */
TEST_F(api, two_fds_of_one_context)
{
	struct ib_uverbs_mmu_notify_event e[2];
	struct notify other = self->notify;
	struct mr mr = MR(1, 1);

	other.fd = notify_fd_alloc(self->notify.ctx);
	ASSERT_LE(0, other.fd);
	ASSERT_EQ(0, fcntl(other.fd, F_SETFL, O_NONBLOCK));
	WATCH(0, 1, 1);
	ASSERT_EQ(0, mr_watch(self->notify.ctx, &mr, other.fd, 2));
	UNMAP(1, 1);
	EXPECT_QUIET(&self->notify);
	ASSERT_EQ(1, events_drain(&other, e, 2));
	EXPECT_EQ(2, e[0].cookie);
	EXPECT_EQ((uintptr_t)PAGE(1), e[0].start);
	EXPECT_EQ((uintptr_t)PAGE(2), e[0].end);
	EXPECT_EQ(UNMAPPED, e[0].reasons);
	EXPECT_EQ(1, e[0].generation);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, 1, PAGE(0), PAGE(1), UNMAPPED);
	EXPECT_EQ(-EAGAIN, events_read(&other, e, 2));
}

/* G8: The end of the context advances the generation and ends read(). */
TEST_F(api, end_of_context)
{
	struct pollfd fd = { .fd = self->notify.fd, .events = POLLIN };
	struct ib_uverbs_mmu_notify_event e;

	WATCH(0, 2, COOKIE);
	EXPECT_EQ(0, poll(&fd, 1, 0));
	UNMAP(0, 1);
	EXPECT_EQ(1, poll(&fd, 1, 0));
	EXPECT_EQ(POLLIN, fd.revents);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
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
 * Registrations that the pin itself makes stale
 */

FIXTURE(born_stale)
{
	struct notify notify;
	size_t page;
	char *map;
	pid_t child;
};

FIXTURE_VARIANT(born_stale)
{
	bool write, forked, read;	/* before the registration */
	uint64_t access;
	bool stale;
};

FIXTURE_VARIANT_ADD(born_stale, ordinary) {
	.write = true, .access = MR_WRITE,
};

FIXTURE_VARIANT_ADD(born_stale, ordinary_read_only) {
	.write = true, .access = MR_READ,
};

FIXTURE_VARIANT_ADD(born_stale, untouched) {
	.access = MR_WRITE,
};

/* The pin finds the zero page. */
FIXTURE_VARIANT_ADD(born_stale, untouched_read_only) {
	.access = MR_READ, .stale = true,
};

FIXTURE_VARIANT_ADD(born_stale, zero_page) {
	.read = true, .access = MR_WRITE, .stale = true,
};

FIXTURE_VARIANT_ADD(born_stale, zero_page_read_only) {
	.read = true, .access = MR_READ, .stale = true,
};

FIXTURE_VARIANT_ADD(born_stale, forked) {
	.write = true, .forked = true, .access = MR_WRITE, .stale = true,
};

FIXTURE_VARIANT_ADD(born_stale, forked_read_only) {
	.write = true, .forked = true, .access = MR_READ, .stale = true,
};

FIXTURE_SETUP(born_stale)
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

FIXTURE_TEARDOWN(born_stale)
{
	if (variant->forked) {
		kill(self->child, SIGKILL);
		child_wait(self->child);
	}
	notify_close(&self->notify);
}

/* G3: Pages that the pin replaces are reported. The next MR is clean. */
TEST_F(born_stale, registered)
{
	struct mr mr = MR(0, 2), again;
	int ctx = self->notify.ctx, queue = self->notify.fd;

	mr.access = variant->access;
	again = mr;
	ASSERT_EQ(0, mr_watch(ctx, &mr, queue, COOKIE));
	if (variant->stale)
		EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(2),
			     MAYBE_STALE);
	ASSERT_EQ(0, mr_watch(ctx, &again, queue, COOKIE));
	EXPECT_QUIET(&self->notify);
	EXPECT_EQ(variant->stale, mr_destroy(ctx, &mr));
	EXPECT_EQ(0, mr_destroy(ctx, &again));
}

/*
 * read()
 */

/* Registers eight-byte MRs, with the index as cookie, and unmaps the pages. */
static void invalidate(struct __test_metadata *_metadata, struct notify *notify,
		       struct mr *mrs, int count)
{
	int pages = count * 8 / getpagesize() + 1, i;
	char *map = pages_map(_metadata, notify, pages);

	for (i = 0; i < count; i++) {
		mrs[i] = mr_of(notify, map + i * 8, 8);
		ASSERT_EQ(0, mr_watch(notify->ctx, &mrs[i], notify->fd, i));
	}
	ASSERT_EQ(0, munmap(map, pages * getpagesize()));
	EXPECT_EQ(notify->seen + count, generation(notify));
}

/*
 * Check that each MR has one event, and that MR_DESTROY returns matching
 * counts. @events has the first @read of these events, in order of generation.
 * The others are pending.
 */
static void expect_all(struct __test_metadata *_metadata, struct notify *notify,
		       const void *events, int read, struct mr *mrs, int count)
{
	struct ib_uverbs_mmu_notify_event *all = calloc(count + 1, EVENT_SIZE);
	int i, left, *seen = calloc(count, sizeof(*seen));

	ASSERT_TRUE(all && seen);
	memcpy(all, events, read * EVENT_SIZE);
	left = events_drain(notify, all + read, count + 1 - read);
	EXPECT_EQ(count - read, left);
	for (i = 0; i < count; i++) {
		ASSERT_GT(count, all[i].cookie);
		EXPECT_EQ(1, ++seen[all[i].cookie]);
		EXPECT_EQ(mrs[all[i].cookie].addr, all[i].start);
		EXPECT_EQ(UNMAPPED, all[i].reasons);
		if (i)
			EXPECT_LT(all[i - 1].generation,
				  all[i].generation);
	}
	for (i = 0; i < count; i++)
		EXPECT_EQ(1, mr_destroy(notify->ctx, &mrs[i]));
}

#define EXPECT_ALL(events, read, mrs, count) \
	expect_all(_metadata, &self->notify, events, read, mrs, count)

/* Interface: EAGAIN means that no event is pending. */
TEST_F(api, read_empty)
{
	struct ib_uverbs_mmu_notify_event e[2];
	struct mr mr[1];

	EXPECT_EQ(-EAGAIN, events_read(&self->notify, e, 2));
	invalidate(_metadata, &self->notify, mr, 1);
	EXPECT_EQ(1, events_drain(&self->notify, e, 2));
	EXPECT_EQ(-EAGAIN, events_read(&self->notify, e, 2));
}

/* Interface: read() fills the buffer; the kernel copies 16 events at a time. */
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
		invalidate(_metadata, &self->notify, mrs, count);
		do {
			int left = count - read;

			got = events_read(&self->notify, e + read, room);
			EXPECT_EQ(left ? (left < room ? left : room) : -EAGAIN,
				  got);
			read += got > 0 ? got : 0;
		} while (got > 0);
		ASSERT_EQ(count, read);
		EXPECT_ALL(e, read, mrs, count);
	}
}

/* Interface: Only whole events are written. */
TEST_F(api, read_whole_events)
{
	struct mr mrs[3];
	size_t i;

	invalidate(_metadata, &self->notify, mrs, 3);
	memset(self->map, 0xee, self->page);
	EXPECT_EQ(2 * EVENT_SIZE, read(self->notify.fd, self->map, 3 * EVENT_SIZE - 1));
	for (i = 2 * EVENT_SIZE; i < 3 * EVENT_SIZE; i++)
		EXPECT_EQ(0xee, (unsigned char)self->map[i]);
	EXPECT_ALL(self->map, 2, mrs, 3);
}

/* G4: A read() without room for an event consumes none. */
TEST_F(api, read_buffer_too_small)
{
	const size_t sizes[] = { 0, 1, EVENT_SIZE - 1 };
	struct mr mrs[2];
	size_t i;

	invalidate(_metadata, &self->notify, mrs, 2);
	for (i = 0; i < ARRAY_SIZE(sizes); i++) {
		EXPECT_EQ(-1, read(self->notify.fd, self->map, sizes[i]));
		EXPECT_EQ(EINVAL, errno);
	}
	EXPECT_ALL(NULL, 0, mrs, 2);
	EXPECT_EQ(-1, read(self->notify.fd, self->map, EVENT_SIZE - 1));
	EXPECT_EQ(EINVAL, errno);
}

/* G4: A read() that fails with EFAULT consumes no event. */
TEST_F(api, read_buffer_faults)
{
	char *const buffers[] = {
		PAGE(0),	/* not mapped */
		PAGE(1),	/* not accessible */
		PAGE(2),	/* not writable */
		(char *)-0x10000L,	/* not a user address */
	};
	struct mr mrs[20];
	size_t i, room;

	UNMAP(0, 1);
	ASSERT_EQ(0, mprotect(PAGE(1), self->page, PROT_NONE));
	ASSERT_EQ(0, mprotect(PAGE(2), self->page, PROT_READ));
	invalidate(_metadata, &self->notify, mrs, 20);
	for (i = 0; i < ARRAY_SIZE(buffers); i++) {
		for (room = 1; room <= 20; room += 19) {
			EXPECT_EQ(-1, read(self->notify.fd, buffers[i],
					   room * EVENT_SIZE));
			EXPECT_EQ(EFAULT, errno);
		}
	}
	EXPECT_EQ(self->notify.seen + 20, generation(&self->notify));
	EXPECT_ALL(NULL, 0, mrs, 20);
}

/* G4: Events before the fault are delivered. The others stay pending. */
TEST_F(api, read_buffer_faults_half_way)
{
	const size_t rooms[] = {
		5 * EVENT_SIZE,		/* between events */
		5 * EVENT_SIZE + 13,	/* within an event */
		EVENT_SIZE - 1,		/* within the first */
		33 * EVENT_SIZE + 1,	/* after two batches of the kernel */
	};
	struct mr mrs[40];
	size_t i;

	for (i = 0; i < ARRAY_SIZE(rooms); i++) {
		int whole = rooms[i] / EVENT_SIZE;
		char *map, *buffer;
		ssize_t got;

		/* The first page is not populated, the second inaccessible. */
		map = mmap(NULL, 2 * self->page, PROT_READ | PROT_WRITE,
			   MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
		ASSERT_NE(MAP_FAILED, map);
		ASSERT_EQ(0, mprotect(map + self->page, self->page, PROT_NONE));
		buffer = map + self->page - rooms[i];

		self->notify.seen = generation(&self->notify);
		invalidate(_metadata, &self->notify, mrs, 40);
		got = read(self->notify.fd, buffer, 40 * EVENT_SIZE);
		if (whole) {
			EXPECT_EQ(whole * EVENT_SIZE, got);
		} else {
			EXPECT_EQ(-1, got);
			EXPECT_EQ(EFAULT, errno);
		}
		EXPECT_ALL(buffer, whole, mrs, 40);
	}
}

/* Interface: readv() is one read(), and does not wait after the first event. */
TEST_F(api, readv)
{
	struct ib_uverbs_mmu_notify_event e[3];
	struct iovec iov[] = { { &e[0], EVENT_SIZE }, { &e[1], 2 * EVENT_SIZE } };
	struct mr mrs[1];

	invalidate(_metadata, &self->notify, mrs, 1);
	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, 0));
	EXPECT_EQ(EVENT_SIZE, readv(self->notify.fd, iov, 2));
	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, O_NONBLOCK));
	EXPECT_ALL(e, 1, mrs, 1);
}

/* Interface: The segments of readv() are one buffer; events may straddle. */
TEST_F(api, readv_straddles)
{
	struct ib_uverbs_mmu_notify_event e[20];
	struct iovec iov[ARRAY_SIZE(e)];
	struct mr mrs[ARRAY_SIZE(e)];
	char *segments = self->map;
	const size_t odd = 13;
	size_t len, left = sizeof(e);
	int i;

	/* One event by segments of eight bytes. */
	invalidate(_metadata, &self->notify, mrs, 1);
	for (i = 0; i < 5; i++)
		iov[i] = (struct iovec){ segments + 16 * i, 8 };
	EXPECT_EQ(EVENT_SIZE, readv(self->notify.fd, iov, 5));
	for (i = 0; i < 5; i++)
		memcpy((char *)e + 8 * i, iov[i].iov_base, 8);
	EXPECT_ALL(e, 1, mrs, 1);

	/* More than a batch of the kernel, by segments of several lengths. */
	self->notify.seen = generation(&self->notify);
	invalidate(_metadata, &self->notify, mrs, ARRAY_SIZE(e));
	for (i = 0; i < ARRAY_SIZE(iov); i++) {
		len = i % 3 * EVENT_SIZE + (i % 2 ? odd : 0);
		if (i == ARRAY_SIZE(iov) - 1 || len > left)
			len = left;
		left -= len;
		iov[i] = (struct iovec){ segments, len };
		segments += len + 1;
	}
	ASSERT_EQ(0, left);
	EXPECT_EQ(sizeof(e), readv(self->notify.fd, iov, ARRAY_SIZE(iov)));
	for (i = 0; i < ARRAY_SIZE(iov); i++) {
		memcpy((char *)e + left, iov[i].iov_base, iov[i].iov_len);
		left += iov[i].iov_len;
	}
	EXPECT_ALL(e, ARRAY_SIZE(e), mrs, ARRAY_SIZE(e));
}

/* G4: An event that straddles into a bad segment is not delivered. */
TEST_F(api, readv_faults)
{
	struct ib_uverbs_mmu_notify_event e[2];
	struct iovec iov[] = {
		{ e, EVENT_SIZE + 8 }, { PAGE(0), 2 * EVENT_SIZE },
	};
	struct mr mrs[3];

	UNMAP(0, 1);
	invalidate(_metadata, &self->notify, mrs, 3);
	EXPECT_EQ(EVENT_SIZE, readv(self->notify.fd, iov, 2));
	iov[0].iov_base = &e[1];
	iov[0].iov_len = 8;
	EXPECT_EQ(-1, readv(self->notify.fd, iov, 2));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_ALL(e, 1, mrs, 3);
}

/* Interface: RWF_NOWAIT acts as O_NONBLOCK. */
TEST_F(api, preadv2_nowait)
{
	struct ib_uverbs_mmu_notify_event e[2];
	struct iovec iov = { e, sizeof(e) };
	struct mr mrs[1];

	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, 0));
	EXPECT_EQ(-1, preadv2(self->notify.fd, &iov, 1, -1, RWF_NOWAIT));
	EXPECT_EQ(EAGAIN, errno);
	invalidate(_metadata, &self->notify, mrs, 1);
	EXPECT_EQ(EVENT_SIZE,
		  preadv2(self->notify.fd, &iov, 1, -1, RWF_NOWAIT));
	EXPECT_EQ(-1, preadv2(self->notify.fd, &iov, 1, -1, RWF_NOWAIT));
	EXPECT_EQ(EAGAIN, errno);
	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, O_NONBLOCK));
	EXPECT_ALL(e, 1, mrs, 1);
}

/* Interface: io_uring waits unless RWF_NOWAIT is set, also with O_NONBLOCK. */
TEST_F(api, io_uring_read)
{
	struct ib_uverbs_mmu_notify_event e[2];
	struct mr mr = WATCH(0, 2, COOKIE);
	struct uring ring;
	int ret = uring_open(&ring), i;

	if (ret)
		SKIP(return, "no io_uring: %s", strerror(-ret));
	memset(ring.sqe, 0, sizeof(*ring.sqe));
	ring.sqe->opcode = IORING_OP_READ;
	ring.sqe->fd = self->notify.fd;
	ring.sqe->off = -1;
	ring.sqe->addr = (uintptr_t)e;
	ring.sqe->len = sizeof(e);
	for (i = 0; i < 2; i++) {
		ring.sqe->rw_flags = RWF_NOWAIT;
		ASSERT_EQ(0, uring_submit(&ring));
		ASSERT_EQ(-EAGAIN, uring_wait(&ring));

		ring.sqe->rw_flags = 0;
		ASSERT_EQ(0, uring_submit(&ring));
		EXPECT_FALSE(uring_done(&ring));
		UNMAP(i, 1);
		ASSERT_EQ(EVENT_SIZE, uring_wait(&ring));
		EXPECT_EQ(COOKIE, e[0].cookie);
		EXPECT_EQ((uintptr_t)PAGE(i), e[0].start);
		EXPECT_EQ(UNMAPPED, e[0].reasons);
		ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, 0));
	}
	EXPECT_EQ(2, mr_destroy(self->notify.ctx, &mr));
}

/*
 * A buffer of two pages. When one is faulted in, a thread drops the other, and
 * sends a signal to the reader.
 */
struct unstable {
	pthread_t reader;
	int uffd;
	char *pages;
	int faults;
	bool stop;
	pthread_t thread;
};

static void *unstable_run(void *arg)
{
	struct unstable *unstable = arg;
	struct pollfd fd = { .fd = unstable->uffd, .events = POLLIN };
	const size_t page = getpagesize();
	struct uffdio_zeropage zero = {};
	struct uffd_msg msg;
	sigset_t all;
	char *addr;

	sigfillset(&all);
	pthread_sigmask(SIG_BLOCK, &all, NULL);
	while (!__atomic_load_n(&unstable->stop, __ATOMIC_RELAXED)) {
		if (poll(&fd, 1, 10) != 1 ||
		    read(unstable->uffd, &msg, sizeof(msg)) != sizeof(msg))
			continue;
		addr = (char *)(uintptr_t)(msg.arg.pagefault.address & -page);
		unstable->faults++;
		pthread_kill(unstable->reader, SIGALRM);
		madvise(addr == unstable->pages ? addr + page : addr - page,
			page, MADV_DONTNEED);
		zero.range.start = (uintptr_t)addr;
		zero.range.len = page;
		ioctl(unstable->uffd, UFFDIO_ZEROPAGE, &zero);
	}
	return NULL;
}

static int signals;

static void count_signal(int sig)
{
	__atomic_add_fetch(&signals, 1, __ATOMIC_RELAXED);
}

/*
 * G4: If the buffer can be faulted in but never written, read() gives up with
 * EFAULT. Signals do not interrupt it.
 */
TEST_F(api, read_buffer_unstable)
{
	const struct sigaction action = { .sa_handler = count_signal };
	struct unstable unstable = { .reader = pthread_self() };
	struct mr mrs[2];

	unstable.pages = mmap(NULL, LEN(2), PROT_READ | PROT_WRITE,
			      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, unstable.pages);
	unstable.uffd = uffd_open(unstable.pages, LEN(2), 0,
				  UFFDIO_REGISTER_MODE_MISSING);
	if (unstable.uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(-unstable.uffd));
	invalidate(_metadata, &self->notify, mrs, 2);
	ASSERT_EQ(0, pthread_create(&unstable.thread, NULL, unstable_run,
				    &unstable));
	ASSERT_EQ(0, sigaction(SIGALRM, &action, NULL));
	EXPECT_EQ(-1, read(self->notify.fd, unstable.pages + self->page - 8,
			   EVENT_SIZE));
	EXPECT_EQ(EFAULT, errno);
	EXPECT_LE(1, __atomic_load_n(&signals, __ATOMIC_RELAXED));
	__atomic_store_n(&unstable.stop, true, __ATOMIC_RELAXED);
	ASSERT_EQ(0, pthread_join(unstable.thread, NULL));
	TH_LOG("gave up after %d faults", unstable.faults);
	EXPECT_LE(2, unstable.faults);
	EXPECT_ALL(NULL, 0, mrs, 2);
}

/* Interface: An unpopulated buffer does not cause a short count. */
TEST_F(api, read_buffer_not_populated)
{
	const int count = 3 * self->page / EVENT_SIZE;
	struct mr *mrs = calloc(count, sizeof(*mrs));
	char *buffer;

	ASSERT_NE(NULL, mrs);
	invalidate(_metadata, &self->notify, mrs, count);
	buffer = mmap(NULL, 3 * self->page, PROT_READ | PROT_WRITE,
		      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, buffer);
	EXPECT_EQ(count * EVENT_SIZE,
		  read(self->notify.fd, buffer, 3 * self->page));
	EXPECT_ALL(buffer, count, mrs, count);
}

/* Interface: write() and lseek() of the FD fail. */
TEST_F(api, no_write_and_no_position)
{
	struct mr mr[1];

	invalidate(_metadata, &self->notify, mr, 1);
	EXPECT_EQ(-1, write(self->notify.fd, self->map, EVENT_SIZE));
	EXPECT_EQ(EBADF, errno);
	EXPECT_EQ(-1, lseek(self->notify.fd, 0, SEEK_SET));
	EXPECT_EQ(ESPIPE, errno);
	EXPECT_EQ(-1, pread(self->notify.fd, self->map, EVENT_SIZE, 0));
	EXPECT_EQ(ESPIPE, errno);
	EXPECT_ALL(NULL, 0, mr, 1);
}

/*
 * The second page of the buffer can never be written, so read() returns a short
 * count while events are pending. A reader that treats a short count as an
 * empty queue would use stale entries.
 */

#define SHORT_MRS	40
#define SHORT_ROOM	5

FIXTURE(short_count)
{
	struct notify notify;
	struct mr mrs[SHORT_MRS];
	/* With room for SHORT_ROOM events before the bad page */
	struct ib_uverbs_mmu_notify_event *buffer;
};

FIXTURE_VARIANT(short_count)
{
	enum { INACCESSIBLE, BEYOND_EOF, POISONED } page;
};

FIXTURE_VARIANT_ADD(short_count, inaccessible) { .page = INACCESSIBLE };
FIXTURE_VARIANT_ADD(short_count, beyond_eof) { .page = BEYOND_EOF };
FIXTURE_VARIANT_ADD(short_count, poisoned) { .page = POISONED };

/* Returns 0 or -errno. */
static int page_poison(char *addr)
{
	struct uffdio_poison poison = {
		.range = { .start = (uintptr_t)addr, .len = getpagesize() },
	};
	int fd = uffd_open(addr, getpagesize(), UFFD_FEATURE_POISON,
			   UFFDIO_REGISTER_MODE_MISSING);

	if (fd < 0)
		return fd;
	return ioctl(fd, UFFDIO_POISON, &poison) ? -errno : 0;
}

FIXTURE_SETUP(short_count)
{
	const size_t page = getpagesize();
	int fd = -1, ret;
	char *map;

	if (variant->page == BEYOND_EOF) {
		fd = memfd_create("uverbs_mmu_notify", 0);
		ASSERT_LE(0, fd);
		ASSERT_EQ(0, ftruncate(fd, page));
	}
	map = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE,
		   fd < 0 ? MAP_PRIVATE | MAP_ANONYMOUS : MAP_SHARED, fd, 0);
	ASSERT_NE(MAP_FAILED, map);
	if (variant->page == INACCESSIBLE)
		ASSERT_EQ(0, mprotect(map + page, page, PROT_NONE));
	if (variant->page == POISONED) {
		ret = page_poison(map + page);
		if (ret)
			SKIP(return, "no UFFDIO_POISON: %s", strerror(-ret));
	}
	self->buffer = (void *)(map + page - SHORT_ROOM * EVENT_SIZE);
	notify_open(_metadata, &self->notify);
	invalidate(_metadata, &self->notify, self->mrs, SHORT_MRS);
}

FIXTURE_TEARDOWN(short_count)
{
	notify_close(&self->notify);
}

/* A cache: the events seen per entry, and the applied generation. */
struct cache {
	int seen[SHORT_MRS];	/* events of each entry */
	uint64_t applied;
};

/*
 * Read, mark, and publish the generation. Does not publish if read() fails with
 * anything but EAGAIN. Returns 0 or -errno.
 */
static int cache_update(struct cache *cache, const struct notify *notify,
			struct ib_uverbs_mmu_notify_event *events, int room,
			bool stop_at_short_count)
{
	uint64_t newest = generation(notify);
	int i, got;

	do {
		got = events_read(notify, events, room);
		if (got == -EAGAIN)
			break;
		if (got < 0)
			return got;
		for (i = 0; i < got; i++) {
			if (events[i].cookie >= SHORT_MRS || !events[i].reasons)
				return -EPROTO;
			cache->seen[events[i].cookie]++;
			if (newest < events[i].generation)
				newest = events[i].generation;
		}
	} while (!stop_at_short_count || got == room);
	cache->applied = newest;
	return 0;
}

/* Returns how many entries are not marked, although all are stale. */
static int cache_missed(const struct cache *cache)
{
	int i, missed = 0;

	for (i = 0; i < SHORT_MRS; i++)
		missed += !cache->seen[i];
	return missed;
}

/* G4: A reader that stops at a short count publishes too early. */
TEST_F(short_count, stop_at_short_count)
{
	struct pollfd fd = { .fd = self->notify.fd, .events = POLLIN };
	struct cache cache = {};

	ASSERT_EQ(0, cache_update(&cache, &self->notify, self->buffer,
				  SHORT_MRS, true));
	EXPECT_EQ(generation(&self->notify), cache.applied);
	EXPECT_EQ(SHORT_MRS - SHORT_ROOM, cache_missed(&cache));
	EXPECT_EQ(1, poll(&fd, 1, 0));
	EXPECT_EQ(POLLIN, fd.revents);
}

/* G4: A reader that drains until EAGAIN sees the fault, then finds the rest. */
TEST_F(short_count, drain_until_eagain)
{
	struct ib_uverbs_mmu_notify_event events[SHORT_MRS / 2];
	struct cache cache = {};
	int i;

	EXPECT_EQ(SHORT_ROOM, events_read(&self->notify, self->buffer, SHORT_MRS));
	for (i = 0; i < SHORT_ROOM; i++) {
		ASSERT_GT(SHORT_MRS, self->buffer[i].cookie);
		cache.seen[self->buffer[i].cookie]++;
	}
	EXPECT_EQ(-EFAULT,
		  cache_update(&cache, &self->notify, self->buffer + SHORT_ROOM,
			       SHORT_MRS, false));
	EXPECT_EQ(0, cache.applied);
	ASSERT_EQ(0, cache_update(&cache, &self->notify, events,
				  ARRAY_SIZE(events), false));
	EXPECT_EQ(generation(&self->notify), cache.applied);
	for (i = 0; i < SHORT_MRS; i++) {
		EXPECT_EQ(1, cache.seen[i]);
		EXPECT_EQ(1, mr_destroy(self->notify.ctx, &self->mrs[i]));
	}
}

/*
 * Waiting
 */

/* A thread that waits for an event, in read() or in ppoll(). */
struct sleeper {
	struct notify *notify;
	bool polls;
	struct ib_uverbs_mmu_notify_event *buffer;	/* or NULL */
	pthread_t thread;
	pid_t tid;
	int result;
};

static void *sleeper_run(void *arg)
{
	struct sleeper *sleeper = arg;
	struct pollfd fd = { .fd = sleeper->notify->fd, .events = POLLIN };
	struct ib_uverbs_mmu_notify_event e;

	__atomic_store_n(&sleeper->tid, syscall(SYS_gettid), __ATOMIC_RELEASE);
	if (sleeper->polls)
		sleeper->result = ppoll(&fd, 1, NULL, NULL) < 0 ? -errno : fd.revents;
	else
		sleeper->result = events_read(sleeper->notify,
					      sleeper->buffer ?: &e, 1);
	return NULL;
}

/* Returns once the thread sleeps in its system call. */
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
		/* "running" or the number of the system call. */
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

/* G6: An event or the end of the context wakes a read(). */
TEST_F(api, read_woken)
{
	struct sleeper sleeper = { .notify = &self->notify };

	WATCH(0, 2, COOKIE);
	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, 0));
	sleeper_start(_metadata, &sleeper);
	UNMAP(0, 1);
	expect_woken(_metadata, &sleeper, 1);

	sleeper_start(_metadata, &sleeper);
	close(self->notify.ctx);
	self->notify.ctx = -1;
	expect_woken(_metadata, &sleeper, -EIO);
}

/* G6: An event or the end of the context wakes a poll(). */
TEST_F(api, poll_woken)
{
	struct sleeper sleeper = { .notify = &self->notify, .polls = true };
	struct ib_uverbs_mmu_notify_event e;

	WATCH(0, 2, COOKIE);
	sleeper_start(_metadata, &sleeper);
	UNMAP(0, 1);
	expect_woken(_metadata, &sleeper, POLLIN);
	EXPECT_EQ(1, events_drain(&self->notify, &e, 1));

	sleeper_start(_metadata, &sleeper);
	close(self->notify.ctx);
	self->notify.ctx = -1;
	expect_woken(_metadata, &sleeper, POLLERR);
}

/* G6: Each of several readers is woken while events are pending. */
TEST_F(api, readers_woken)
{
	struct sleeper sleepers[3];
	int i;

	for (i = 0; i < 3; i++)
		WATCH(i, 1, i);
	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, 0));
	for (i = 0; i < 3; i++) {
		sleepers[i] = (struct sleeper){ .notify = &self->notify };
		sleeper_start(_metadata, &sleepers[i]);
	}
	UNMAP(0, 3);
	for (i = 0; i < 3; i++)
		expect_woken(_metadata, &sleepers[i], 1);
	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, O_NONBLOCK));
	self->notify.seen += 3;
	EXPECT_QUIET(&self->notify);
}

/* G6: A reader stuck in a fault on its buffer leaves the event to another. */
TEST_F(api, reader_stuck)
{
	struct sleeper stuck = { .notify = &self->notify };
	struct sleeper other = { .notify = &self->notify };
	struct uffdio_zeropage zero = { .range.len = self->page };
	int uffd;

	stuck.buffer = mmap(NULL, self->page, PROT_READ | PROT_WRITE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	ASSERT_NE(MAP_FAILED, stuck.buffer);
	uffd = uffd_open(stuck.buffer, self->page, 0,
			 UFFDIO_REGISTER_MODE_MISSING);
	if (uffd < 0)
		SKIP(return, "no userfaultfd: %s", strerror(-uffd));
	WATCH(0, 1, COOKIE);
	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, 0));
	/* The first to sleep is the first to be woken. */
	sleeper_start(_metadata, &stuck);
	sleeper_start(_metadata, &other);
	UNMAP(0, 1);
	expect_woken(_metadata, &other, 1);

	close(self->notify.ctx);
	self->notify.ctx = -1;
	zero.range.start = (uintptr_t)stuck.buffer;
	ioctl(uffd, UFFDIO_ZEROPAGE, &zero);
	expect_woken(_metadata, &stuck, -EIO);
}

/* G6: The end of the context wakes all readers and pollers. */
TEST_F(api, end_of_context_wakes_all)
{
	struct sleeper sleepers[4];
	int i;

	ASSERT_EQ(0, fcntl(self->notify.fd, F_SETFL, 0));
	for (i = 0; i < 4; i++) {
		sleepers[i] = (struct sleeper){
			.notify = &self->notify,
			.polls = i == 3,
		};
		sleeper_start(_metadata, &sleepers[i]);
	}
	close(self->notify.ctx);
	self->notify.ctx = -1;
	for (i = 0; i < 3; i++)
		expect_woken(_metadata, &sleepers[i], -EIO);
	expect_woken(_metadata, &sleepers[3], POLLERR);
}

/* G6: The first pending event raises an edge; an event that merges does not. */
TEST_F(api, epoll_edge)
{
	struct epoll_event want = { .events = EPOLLIN | EPOLLET }, got;
	int ep = epoll_create1(EPOLL_CLOEXEC);

	ASSERT_LE(0, ep);
	ASSERT_EQ(0, epoll_ctl(ep, EPOLL_CTL_ADD, self->notify.fd, &want));
	WATCH(0, 4, COOKIE);
	EXPECT_EQ(0, epoll_wait(ep, &got, 1, 0));
	UNMAP(0, 1);
	EXPECT_EQ(1, epoll_wait(ep, &got, 1, 0));
	EXPECT_EQ(EPOLLIN, got.events);
	EXPECT_EQ(0, epoll_wait(ep, &got, 1, 0));
	UNMAP(1, 1);
	EXPECT_EQ(0, epoll_wait(ep, &got, 1, 0));
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(2), UNMAPPED);
	UNMAP(2, 1);
	EXPECT_EQ(1, epoll_wait(ep, &got, 1, 0));
	EXPECT_EQ(EPOLLIN, got.events);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(2), PAGE(3), UNMAPPED);
}

/*
 * The generation page
 */

/* Interface: Only one page can be mapped, read-only and shared. */
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
					   self->notify.fd,
					   refused[i].offset)) {
			TH_LOG("case %zu", i);
		}
		EXPECT_EQ(refused[i].err, errno) {
			TH_LOG("case %zu", i);
		}
	}
	/* The length is rounded up to a page. */
	EXPECT_NE(MAP_FAILED, mmap(NULL, 8, PROT_READ, MAP_SHARED,
				   self->notify.fd, 0));
}

/* Interface: The page cannot be made writable or executable. */
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

/* G2: MADV_DONTNEED does not take the page away. */
TEST_F(api, page_survives_dontneed)
{
	uint64_t i;

	WATCH(0, 2, COOKIE);
	for (i = 0; i < 3; i++) {
		EXPECT_EQ(i, generation(&self->notify));
		ASSERT_EQ(0, madvise((void *)self->notify.page, self->page,
				     MADV_DONTNEED));
		EXPECT_EQ(i, generation(&self->notify));
		if (i < 2) {
			UNMAP(i, 1);
			EXPECT_EVENT(&self->notify, COOKIE, PAGE(i),
				     PAGE(i + 1), UNMAPPED);
		}
	}
}

/* G2: All mappings of the page show the same generation. */
TEST_F(api, page_mapped_twice)
{
	struct notify other = self->notify;

	other.page = mmap(NULL, self->page, PROT_READ, MAP_SHARED,
			  self->notify.fd, 0);
	ASSERT_NE(MAP_FAILED, other.page);
	WATCH(0, 1, COOKIE);
	UNMAP(0, 1);
	EXPECT_EQ(1, generation(&self->notify));
	EXPECT_EQ(1, generation(&other));
}

/* G8: A child does not inherit the page. */
TEST_F(api, page_gone_in_child)
{
	pid_t child = fork();

	if (!child)
		_exit(generation(&self->notify));
	EXPECT_EQ(-SIGSEGV, child_wait(child));
	EXPECT_QUIET(&self->notify);
}

/*
 * Other address spaces
 */

/* G4: A child cannot take its parent's events. */
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
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
	EXPECT_EQ(1, mr_destroy(self->notify.ctx, &mr));
}

/* G1: An FD watches the address space that created it, and no other. */
TEST_F(api, registration_by_child)
{
	struct mr mr = MR(0, 1);
	pid_t child = fork();

	if (!child)
		_exit(-mr_watch(self->notify.ctx, &mr, self->notify.fd,
				COOKIE));
	EXPECT_EQ(EPERM, child_wait(child));
	EXPECT_QUIET(&self->notify);
	/* The pin may have to replace a page that was shared with the child. */
	ASSERT_EQ(0, mr_settle(self->notify.ctx, mr));
	WATCH(0, 1, COOKIE);
	UNMAP(0, 1);
	EXPECT_EVENT(&self->notify, COOKIE, PAGE(0), PAGE(1), UNMAPPED);
}

/* G1: A child of vfork() shares the address space. */
TEST_F(api, vfork_child)
{
	struct ib_uverbs_mmu_notify_event e;
	struct mr mr = MR(0, 1);
	pid_t child = vfork();

	if (!child) {
		if (mr_watch(self->notify.ctx, &mr, self->notify.fd, COOKIE))
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
 * The write() commands
 */

#define EX_COMMAND(name) \
	(IB_USER_VERBS_EX_CMD_##name | IB_USER_VERBS_CMD_FLAG_EXTENDED)

/* Interface: The commands do the same as the methods. */
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
	other.fd = created.notify_fd;
	ASSERT_EQ(0, fcntl(other.fd, F_SETFL, O_NONBLOCK));

	reg.notify_fd = other.fd;
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
	ASSERT_EQ(1, events_drain(&other, e, 2));
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

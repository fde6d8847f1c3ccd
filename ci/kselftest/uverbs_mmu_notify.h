/* SPDX-License-Identifier: GPL-2.0 */
/*
 * uverbs calls without libibverbs, on a soft-RoCE or soft-iWARP device, and the
 * common part of the MMU notification tests.
 *
 * The comment at each test names the guarantee that the test checks. The top of
 * drivers/infiniband/core/uverbs_mmu_notify.rs explains the guarantees. In
 * short:
 *
 *  G1  nothing missed: changes that can make a live MR stale are reported
 *  G2  in time: when the changing call returns, userspace can see the change
 *  G3  registration: a change during a registration is not missed
 *  G4  nothing lost: changes merge, and a failed read() consumes no event
 *  G5  exact count: deregistration returns the number of delivered events
 *  G6  waits: no wake-up is lost
 *  G7  quiet: changes of protection and similar events are not reported
 *  G8  lifetimes: any order of close, exit, exec and fork is safe
 *
 * "Interface" marks a test of a call itself.
 */
#ifndef UVERBS_MMU_NOTIFY_H
#define UVERBS_MMU_NOTIFY_H

#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <linux/userfaultfd.h>
#include <rdma/ib_user_ioctl_cmds.h>
#include <rdma/ib_user_ioctl_verbs.h>
#include <rdma/ib_user_verbs.h>
#include <rdma/rdma_user_ioctl_cmds.h>
#include <rdma/siw-abi.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "kselftest_harness.h"

#define UNMAPPED	IB_UVERBS_MMU_NOTIFY_UNMAPPED
#define MAYBE_STALE	IB_UVERBS_MMU_NOTIFY_MAYBE_STALE

#define MR_READ		IB_UVERBS_ACCESS_REMOTE_READ
#define MR_WRITE	(MR_READ | IB_UVERBS_ACCESS_LOCAL_WRITE | \
			 IB_UVERBS_ACCESS_REMOTE_WRITE)

static inline bool on_siw(void)
{
	const char *driver = getenv("UVERBS_DRIVER");

	return driver && !strcmp(driver, "siw");
}

/* An ioctl() method call with its attributes. */
struct call {
	union {
		struct ib_uverbs_ioctl_hdr hdr;
		char room[sizeof(struct ib_uverbs_ioctl_hdr) +
			  16 * sizeof(struct ib_uverbs_attr)];
	};
};

static inline void call_init(struct call *call, int object, int method)
{
	memset(call, 0, sizeof(*call));
	call->hdr.object_id = object;
	call->hdr.method_id = method;
	call->hdr.driver_id = on_siw() ? RDMA_DRIVER_SIW : RDMA_DRIVER_RXE;
}

/* @data is a handle, an FD, a pointer, or an input of up to eight bytes. */
static inline struct ib_uverbs_attr *call_attr(struct call *call, int id,
					       size_t len, uint64_t data)
{
	struct ib_uverbs_attr *attr = &call->hdr.attrs[call->hdr.num_attrs++];

	attr->attr_id = id;
	attr->len = len;
	attr->flags = UVERBS_ATTR_F_MANDATORY;
	attr->data = data;
	return attr;
}

static inline void call_out(struct call *call, int id, void *out, size_t len)
{
	call_attr(call, id, len, (uintptr_t)out);
}

/* Driver-specific attributes that siw requires; the tests ignore them. */
static inline void call_siw(struct call *call, size_t in_len, size_t out_len)
{
	static uint64_t out[2];

	if (!on_siw())
		return;
	if (in_len)
		call_attr(call, UVERBS_ATTR_UHW_IN, in_len, 0);
	call_out(call, UVERBS_ATTR_UHW_OUT, out, out_len);
}

/* Returns 0 or -errno. */
static inline int call_make(struct call *call, int fd)
{
	call->hdr.length = sizeof(call->hdr) +
			   call->hdr.num_attrs * sizeof(call->hdr.attrs[0]);
	return ioctl(fd, RDMA_VERBS_IOCTL, call) ? -errno : 0;
}

/* A write() command, issued with INVOKE_WRITE. */
static inline int command(int fd, uint32_t cmd, const void *in, size_t in_len,
			  void *out, size_t out_len)
{
	uint64_t data = (uintptr_t)in;
	struct call call;

	if (in_len <= sizeof(data))	/* short inputs are in the attribute */
		memcpy(&data, in, in_len);
	call_init(&call, UVERBS_OBJECT_DEVICE, UVERBS_METHOD_INVOKE_WRITE);
	call_attr(&call, UVERBS_ATTR_WRITE_CMD, sizeof(uint64_t), cmd);
	call_attr(&call, UVERBS_ATTR_CORE_IN, in_len, data);
	if (out)
		call_out(&call, UVERBS_ATTR_CORE_OUT, out, out_len);
	return call_make(&call, fd);
}

/* Returns a context or -errno. */
static inline int context_open(uint64_t *core_support)
{
	int fd = open(getenv("UVERBS_DEV"), O_RDWR | O_CLOEXEC);
	struct call call;
	int ret;

	if (fd < 0)
		return -errno;
	call_init(&call, UVERBS_OBJECT_DEVICE, UVERBS_METHOD_GET_CONTEXT);
	call_out(&call, UVERBS_ATTR_GET_CONTEXT_CORE_SUPPORT, core_support,
		 sizeof(*core_support));
	call_siw(&call, 0, sizeof(struct siw_uresp_alloc_ctx));
	ret = call_make(&call, fd);
	if (ret)
		close(fd);
	return ret ?: fd;
}

static inline int pd_alloc(int ctx, uint32_t *pd)
{
	struct ib_uverbs_alloc_pd in = {};

	return command(ctx, IB_USER_VERBS_CMD_ALLOC_PD, &in, sizeof(in), pd,
		       sizeof(*pd));
}

/* Returns a notification FD or -errno. */
static inline int notify_fd_alloc(int ctx)
{
	struct call call;
	int ret;

	call_init(&call, UVERBS_OBJECT_MMU_NOTIFY,
		  UVERBS_METHOD_MMU_NOTIFY_ALLOC);
	call_attr(&call, UVERBS_ATTR_MMU_NOTIFY_ALLOC_FD_HANDLE, 0, 0);
	ret = call_make(&call, ctx);
	return ret ?: (int)call.hdr.attrs[0].data_s64;
}

struct mr {
	uint32_t pd;
	uint64_t addr;
	uint64_t length;
	uint64_t access;
	uint32_t keys[2];
	uint32_t handle;
};

/* REG_MR of a plain MR, without the notification attributes. */
static inline void mr_call(struct call *call, struct mr *mr)
{
	call_init(call, UVERBS_OBJECT_MR, UVERBS_METHOD_REG_MR);
	call_attr(call, UVERBS_ATTR_REG_MR_HANDLE, 0, 0);
	call_attr(call, UVERBS_ATTR_REG_MR_PD_HANDLE, 0, mr->pd);
	call_attr(call, UVERBS_ATTR_REG_MR_IOVA, 8, mr->addr);
	call_attr(call, UVERBS_ATTR_REG_MR_ADDR, 8, mr->addr);
	call_attr(call, UVERBS_ATTR_REG_MR_LENGTH, 8, mr->length);
	call_attr(call, UVERBS_ATTR_REG_MR_ACCESS_FLAGS, 8, mr->access);
	call_out(call, UVERBS_ATTR_REG_MR_RESP_LKEY, &mr->keys[0], 4);
	call_out(call, UVERBS_ATTR_REG_MR_RESP_RKEY, &mr->keys[1], 4);
	call_siw(call, sizeof(struct siw_ureq_reg_mr),
		 sizeof(struct siw_uresp_reg_mr));
}

static inline int mr_make(struct call *call, int ctx, struct mr *mr)
{
	int ret = call_make(call, ctx);

	mr->handle = call->hdr.attrs[0].data;
	return ret;
}

static inline void mr_call_watched(struct call *call, struct mr *mr,
				   int64_t fd, uint64_t cookie)
{
	mr_call(call, mr);
	call_attr(call, UVERBS_ATTR_REG_MR_NOTIFY_FD, 0, fd);
	call_attr(call, UVERBS_ATTR_REG_MR_NOTIFY_COOKIE, 8, cookie);
}

static inline int mr_watch(int ctx, struct mr *mr, int64_t fd, uint64_t cookie)
{
	struct call call;

	mr_call_watched(&call, mr, fd, cookie);
	return mr_make(&call, ctx, mr);
}

/* Returns the number of events delivered, or -errno. */
static inline int mr_destroy(int ctx, const struct mr *mr)
{
	uint32_t reported = ~0;
	struct call call;
	int ret;

	call_init(&call, UVERBS_OBJECT_MR, UVERBS_METHOD_MR_DESTROY);
	call_attr(&call, UVERBS_ATTR_DESTROY_MR_HANDLE, 0, mr->handle);
	call_out(&call, UVERBS_ATTR_DESTROY_MR_RESP_EVENTS_REPORTED, &reported,
		 sizeof(reported));
	ret = call_make(&call, ctx);
	return ret ?: (int)reported;
}

/* A context, a PD, a notification FD and its mapped page. */
struct notify {
	int ctx;
	uint32_t pd;
	int fd;
	const struct ib_uverbs_mmu_notify_page *page;
	uint64_t seen;	/* the generation when the events were last read */
};

static inline uint64_t generation(const struct notify *notify)
{
	return __atomic_load_n(&notify->page->generation, __ATOMIC_ACQUIRE);
}

static inline void notify_open(struct __test_metadata *_metadata,
			       struct notify *notify)
{
	uint64_t core_support;

	notify->ctx = context_open(&core_support);
	ASSERT_LE(0, notify->ctx);
	ASSERT_EQ(0, pd_alloc(notify->ctx, &notify->pd));
	notify->fd = notify_fd_alloc(notify->ctx);
	ASSERT_LE(0, notify->fd);
	ASSERT_EQ(0, fcntl(notify->fd, F_SETFL, O_NONBLOCK));
	notify->page = mmap(NULL, getpagesize(), PROT_READ, MAP_SHARED,
			    notify->fd, 0);
	ASSERT_NE(MAP_FAILED, notify->page);
	notify->seen = generation(notify);
}

static inline void notify_close(struct notify *notify)
{
	munmap((void *)notify->page, getpagesize());
	close(notify->fd);
	close(notify->ctx);
}

static inline struct mr mr_of(const struct notify *notify, const void *addr,
			      size_t length)
{
	return (struct mr){
		.pd = notify->pd,
		.addr = (uintptr_t)addr,
		.length = length,
		.access = MR_WRITE,
	};
}

/* One read(). Returns the number of events or -errno. */
static inline int events_read(const struct notify *notify,
			      struct ib_uverbs_mmu_notify_event *events,
			      int room)
{
	ssize_t ret = read(notify->fd, events, room * sizeof(*events));

	return ret < 0 ? -errno : (int)(ret / sizeof(*events));
}

/*
 * Read until EAGAIN: a short count does not mean that the queue is empty.
 * Returns the number of events or -errno. Pass room for one event more than
 * expected.
 */
static inline int events_drain(const struct notify *notify,
			       struct ib_uverbs_mmu_notify_event *events,
			       int room)
{
	int total = 0, got;

	while (total < room) {
		got = events_read(notify, events + total, room - total);
		if (got == -EAGAIN)
			break;
		if (got < 0)
			return got;
		total += got;
	}
	return total;
}

/* Nothing has been reported since the events were last read. */
#define EXPECT_QUIET(of) do {					\
	const struct notify *_quiet = (of);			\
	struct ib_uverbs_mmu_notify_event _event;		\
								\
	EXPECT_EQ(_quiet->seen, generation(_quiet));		\
	EXPECT_EQ(-EAGAIN, events_read(_quiet, &_event, 1));	\
} while (0)

/* Register once, so that pages leave ZONE_MOVABLE and CMA before the test. */
static inline int mr_settle(int ctx, struct mr mr)
{
	struct call call;
	int ret;

	mr_call(&call, &mr);
	ret = mr_make(&call, ctx, &mr);
	return ret ?: mr_destroy(ctx, &mr);
}

static inline void *pages_map(struct __test_metadata *_metadata,
			      const struct notify *notify, int pages)
{
	size_t len = pages * getpagesize();
	char *addr = mmap(NULL, len, PROT_READ | PROT_WRITE,
			  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	ASSERT_NE(MAP_FAILED, addr);
	/* An invalidation of a huge page would also cover its other pages. */
	madvise(addr, len, MADV_NOHUGEPAGE);
	memset(addr, 0x5a, len);
	ASSERT_EQ(0, mr_settle(notify->ctx, mr_of(notify, addr, len)));
	return addr;
}

/* Returns the child's exit code, or the signal that killed it, negated. */
static inline int child_wait(pid_t child)
{
	int status;

	if (child < 0 || waitpid(child, &status, 0) != child)
		return -1000;
	return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

/* Returns a userfaultfd of the range, or -errno. */
static inline int uffd_open(void *addr, size_t len, uint64_t features,
			    uint64_t mode)
{
	struct uffdio_api api = { .api = UFFD_API, .features = features };
	struct uffdio_register reg = {
		.range = { .start = (uintptr_t)addr, .len = len },
		.mode = mode,
	};
	int fd = syscall(__NR_userfaultfd, O_CLOEXEC | O_NONBLOCK), ret;

	if (fd < 0)
		return -errno;
	if (ioctl(fd, UFFDIO_API, &api) || ioctl(fd, UFFDIO_REGISTER, &reg)) {
		ret = -errno;
		close(fd);
		return ret;
	}
	return fd;
}

/* An io_uring for one request at a time. */
struct uring {
	int fd;
	struct io_uring_params params;
	char *sq;
	char *cq;
	struct io_uring_sqe *sqe;
};

/* Returns 0 or -errno. */
static inline int uring_open(struct uring *ring)
{
	const struct io_uring_params *p = &ring->params;
	const int rw = PROT_READ | PROT_WRITE;

	memset(ring, 0, sizeof(*ring));
	ring->fd = syscall(__NR_io_uring_setup, 1, &ring->params);
	if (ring->fd < 0)
		return -errno;
	ring->sq = mmap(NULL, p->sq_off.array + p->sq_entries * sizeof(__u32),
			rw, MAP_SHARED, ring->fd, IORING_OFF_SQ_RING);
	ring->cq = mmap(NULL, p->cq_off.cqes +
			p->cq_entries * sizeof(struct io_uring_cqe),
			rw, MAP_SHARED, ring->fd, IORING_OFF_CQ_RING);
	ring->sqe = mmap(NULL, p->sq_entries * sizeof(*ring->sqe), rw,
			 MAP_SHARED, ring->fd, IORING_OFF_SQES);
	if (ring->sq == MAP_FAILED || ring->cq == MAP_FAILED ||
	    ring->sqe == MAP_FAILED)
		return -errno;
	return 0;
}

/* Submit the request in ring->sqe. Returns 0 or -errno. */
static inline int uring_submit(struct uring *ring)
{
	__u32 *tail = (__u32 *)(ring->sq + ring->params.sq_off.tail);

	*(__u32 *)(ring->sq + ring->params.sq_off.array) = 0;
	__atomic_store_n(tail, *tail + 1, __ATOMIC_RELEASE);
	if (syscall(__NR_io_uring_enter, ring->fd, 1, 0, 0, NULL, 0) != 1)
		return -errno;
	return 0;
}

static inline bool uring_done(const struct uring *ring)
{
	const __u32 *head = (__u32 *)(ring->cq + ring->params.cq_off.head);
	const __u32 *tail = (__u32 *)(ring->cq + ring->params.cq_off.tail);

	return __atomic_load_n(tail, __ATOMIC_ACQUIRE) != *head;
}

/* Wait for the request and return its result. */
static inline int uring_wait(struct uring *ring)
{
	const struct io_uring_cqe *cqes =
		(struct io_uring_cqe *)(ring->cq + ring->params.cq_off.cqes);
	__u32 *head = (__u32 *)(ring->cq + ring->params.cq_off.head);
	__u32 mask = ring->params.cq_entries - 1;
	int result;

	while (!uring_done(ring)) {
		if (syscall(__NR_io_uring_enter, ring->fd, 0, 1,
			    IORING_ENTER_GETEVENTS, NULL, 0) < 0)
			return -errno;
	}
	result = cqes[*head & mask].res;
	__atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
	return result;
}

/* The tests need a device, and a kernel with MMU notification. */
static inline int notify_main(int argc, char **argv)
{
	uint64_t core_support = 0;
	int ctx;

	if (!getenv("UVERBS_DEV"))
		ksft_exit_skip("UVERBS_DEV is not set: run uverbs_mmu_notify.sh\n");
	ctx = context_open(&core_support);
	if (ctx < 0)
		ksft_exit_fail_msg("cannot open %s: %s\n",
				   getenv("UVERBS_DEV"), strerror(-ctx));
	close(ctx);
	if (!(core_support & IB_UVERBS_CORE_SUPPORT_MMU_NOTIFY))
		ksft_exit_skip("the kernel has no MMU notification\n");
	return test_harness_run(argc, argv);
}

#endif /* UVERBS_MMU_NOTIFY_H */

/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * Tracepoints of drivers/infiniband/core/uverbs_mmu_notify.rs. The queue
 * pointer identifies the notification FD, since cookies need not be unique.
 * Trace events are emitted without the queue lock, so trace events of different
 * tasks can be out of order.
 */

#undef TRACE_SYSTEM
#define TRACE_SYSTEM ib_uverbs_mmu_notify

#if !defined(_TRACE_IB_UVERBS_MMU_NOTIFY_H) || defined(TRACE_HEADER_MULTI_READ)
#define _TRACE_IB_UVERBS_MMU_NOTIFY_H

#include <linux/mmu_notifier.h>
#include <linux/tracepoint.h>
#include <rdma/ib_user_ioctl_verbs.h>

TRACE_DEFINE_ENUM(MMU_NOTIFY_UNMAP);
TRACE_DEFINE_ENUM(MMU_NOTIFY_CLEAR);
TRACE_DEFINE_ENUM(MMU_NOTIFY_PROTECTION_VMA);
TRACE_DEFINE_ENUM(MMU_NOTIFY_PROTECTION_PAGE);
TRACE_DEFINE_ENUM(MMU_NOTIFY_SOFT_DIRTY);
TRACE_DEFINE_ENUM(MMU_NOTIFY_RELEASE);
TRACE_DEFINE_ENUM(MMU_NOTIFY_MIGRATE);
TRACE_DEFINE_ENUM(MMU_NOTIFY_EXCLUSIVE);

#define show_uverbs_mmu_notify_event(event)					\
	__print_symbolic(event,						\
		{ MMU_NOTIFY_UNMAP, "UNMAP" },				\
		{ MMU_NOTIFY_CLEAR, "CLEAR" },				\
		{ MMU_NOTIFY_PROTECTION_VMA, "PROTECTION_VMA" },	\
		{ MMU_NOTIFY_PROTECTION_PAGE, "PROTECTION_PAGE" },	\
		{ MMU_NOTIFY_SOFT_DIRTY, "SOFT_DIRTY" },		\
		{ MMU_NOTIFY_RELEASE, "RELEASE" },			\
		{ MMU_NOTIFY_MIGRATE, "MIGRATE" },			\
		{ MMU_NOTIFY_EXCLUSIVE, "EXCLUSIVE" })

/* A watch was started. The range is that of the MR; the end is exclusive. */
TRACE_EVENT(uverbs_mmu_notify_start,
	TP_PROTO(const void *queue, u64 cookie, u64 start, u64 end),
	TP_ARGS(queue, cookie, start, end),

	TP_STRUCT__entry(
		__field(const void *, queue)
		__field(u64, cookie)
		__field(u64, start)
		__field(u64, end)
	),

	TP_fast_assign(
		__entry->queue = queue;
		__entry->cookie = cookie;
		__entry->start = start;
		__entry->end = end;
	),

	TP_printk("queue=%p cookie=0x%llx start=0x%llx end=0x%llx",
		  __entry->queue, __entry->cookie, __entry->start,
		  __entry->end)
);

/*
 * The mapping under a watched MR changes. The event and the range are those of
 * the MMU notifier; the range may reach beyond the MR. The generation is the
 * new one, or 0 if it did not advance: the invalidation merged into a pending
 * event, the MR is still being registered, or the FD is closed. Changes of
 * protection and other ignored events are not traced.
 */
TRACE_EVENT(uverbs_mmu_notify_invalidate,
	TP_PROTO(const void *queue, u64 cookie, int event, u64 start, u64 end,
		 u64 generation),
	TP_ARGS(queue, cookie, event, start, end, generation),

	TP_STRUCT__entry(
		__field(const void *, queue)
		__field(u64, cookie)
		__field(u64, start)
		__field(u64, end)
		__field(u64, generation)
		__field(int, event)
	),

	TP_fast_assign(
		__entry->queue = queue;
		__entry->cookie = cookie;
		__entry->start = start;
		__entry->end = end;
		__entry->generation = generation;
		__entry->event = event;
	),

	TP_printk("queue=%p cookie=0x%llx event=%s start=0x%llx end=0x%llx generation=%llu",
		  __entry->queue, __entry->cookie,
		  show_uverbs_mmu_notify_event(__entry->event),
		  __entry->start, __entry->end, __entry->generation)
);

/* An event was copied to userspace. */
TRACE_EVENT(uverbs_mmu_notify_deliver,
	TP_PROTO(const void *queue,
		 const struct ib_uverbs_mmu_notify_event *record),
	TP_ARGS(queue, record),

	TP_STRUCT__entry(
		__field(const void *, queue)
		__field(u64, cookie)
		__field(u64, start)
		__field(u64, end)
		__field(u64, generation)
		__field(u32, reasons)
	),

	TP_fast_assign(
		__entry->queue = queue;
		__entry->cookie = record->cookie;
		__entry->start = record->start;
		__entry->end = record->end;
		__entry->generation = record->generation;
		__entry->reasons = record->reasons;
	),

	TP_printk("queue=%p cookie=0x%llx start=0x%llx end=0x%llx generation=%llu reasons=0x%x",
		  __entry->queue, __entry->cookie, __entry->start,
		  __entry->end, __entry->generation, __entry->reasons)
);

/* A watch was stopped. events_reported is the number of delivered events. */
TRACE_EVENT(uverbs_mmu_notify_stop,
	TP_PROTO(const void *queue, u64 cookie, u32 events_reported),
	TP_ARGS(queue, cookie, events_reported),

	TP_STRUCT__entry(
		__field(const void *, queue)
		__field(u64, cookie)
		__field(u32, events_reported)
	),

	TP_fast_assign(
		__entry->queue = queue;
		__entry->cookie = cookie;
		__entry->events_reported = events_reported;
	),

	TP_printk("queue=%p cookie=0x%llx events_reported=%u",
		  __entry->queue, __entry->cookie, __entry->events_reported)
);

#endif /* _TRACE_IB_UVERBS_MMU_NOTIFY_H */

/* This part must be outside protection */
#include <trace/define_trace.h>

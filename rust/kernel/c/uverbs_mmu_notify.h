/* SPDX-License-Identifier: GPL-2.0 OR Linux-OpenIB */

#ifndef UVERBS_MMU_NOTIFY_H
#define UVERBS_MMU_NOTIFY_H

#include <linux/err.h>
#include <linux/types.h>

struct file;
struct iov_iter;
struct page;
struct poll_table_struct;

/*
 * The core of MMU notification. uverbs_mmu_notify.rs describes how its parts
 * work together.
 *
 * A queue collects events and backs one notification FD. It is reference
 * counted, and each watch owns a reference. It is bound to the address space of
 * its creator: watches cover only that address space, and only its tasks can
 * read.
 *
 * A watch is owned by the uobject of one MR. It records each change of the
 * mapping that begins after ib_uverbs_mmu_watch_start() has returned, and
 * queues events once ib_uverbs_mmu_watch_go_live() has been called.
 *
 * Unless noted otherwise the functions are for process context and may sleep.
 */
struct ib_uverbs_mmu_queue;
struct ib_uverbs_mmu_watch;

/*
 * Create a queue for the current address space. The caller owns one reference.
 * mmap_lock must not be held.
 *
 * Return: the queue, or an ERR_PTR: -ENOMEM; -EINTR if a signal is pending;
 * -EPERM in a kernel thread without an address space.
 */
struct ib_uverbs_mmu_queue *ib_uverbs_mmu_queue_alloc(void);

/* Take one more reference. Any context. */
void ib_uverbs_mmu_queue_get(struct ib_uverbs_mmu_queue *queue);

/*
 * Close the queue and put a reference. Closing wakes readers and pollers,
 * advances the generation one last time, and ends delivery. Closing again has
 * no effect, but the reference is put on every call.
 */
void ib_uverbs_mmu_queue_close_put(struct ib_uverbs_mmu_queue *queue);

/*
 * Close the queue, free its page, and put a reference. Called on release of the
 * file, when no mapping of the page is left.
 */
void ib_uverbs_mmu_queue_release_put(struct ib_uverbs_mmu_queue *queue);

/*
 * Implement read_iter(): copy events to @to.
 *
 * Return: the number of bytes copied (whole events, at least one; a short count
 * does not mean that the queue is empty), or a negative errno, in which case no
 * event was consumed: -EPERM in another address space; -EINVAL if no event
 * fits; -EIO if the queue is closed; -EAGAIN if no event is pending and
 * @nonblock; -ERESTARTSYS if a signal ended the wait for an event; -EFAULT if
 * the buffer cannot be written; -EINTR if the task is being killed.
 */
ssize_t ib_uverbs_mmu_queue_read(struct ib_uverbs_mmu_queue *queue,
				 struct iov_iter *to, bool nonblock);

/*
 * Implement poll(): EPOLLIN | EPOLLRDNORM if an event is pending, EPOLLERR if
 * the queue is closed. @file must be a stream.
 */
__poll_t ib_uverbs_mmu_queue_poll(struct ib_uverbs_mmu_queue *queue,
				  struct file *file,
				  struct poll_table_struct *wait);

/*
 * Return the generation page, or NULL after ib_uverbs_mmu_queue_release_put().
 */
struct page *ib_uverbs_mmu_queue_page(struct ib_uverbs_mmu_queue *queue);

#if IS_ENABLED(CONFIG_INFINIBAND_USER_MMU_NOTIFY)
/*
 * Start watching the mapping of @length bytes at @start, an untagged address,
 * in the current address space, for an MR that is about to be created.
 *
 * Waits uninterruptibly for the running invalidations of the address space.
 * Every change that begins after this function has returned is recorded, and is
 * reported once the watch is live. mmap_lock must not be held.
 *
 * Return: the watch, which the caller must stop, or an ERR_PTR: -EPERM in
 * another address space than the creator's; -EINVAL if @length is zero or the
 * range wraps around; -EIO if the queue is closed; -ENOMEM.
 */
struct ib_uverbs_mmu_watch *
ib_uverbs_mmu_watch_start(struct ib_uverbs_mmu_queue *queue, u64 start,
			  u64 length, u64 cookie);

/*
 * Start queueing events. If a change was recorded since
 * ib_uverbs_mmu_watch_start(), its event is queued at once. Does not sleep.
 */
void ib_uverbs_mmu_watch_go_live(struct ib_uverbs_mmu_watch *watch);

/*
 * Stop a watch and free it. A pending event is dropped and not counted.
 *
 * May wait uninterruptibly for running invalidations of the address space. The
 * caller must not hold a lock that is also held across an invalidation, such as
 * mmap_lock.
 *
 * Return: the number of events of the watch that were delivered, modulo 2^32.
 * No event of the watch is delivered after the return.
 */
u32 ib_uverbs_mmu_watch_stop(struct ib_uverbs_mmu_watch *watch);
#else
static inline struct ib_uverbs_mmu_watch *
ib_uverbs_mmu_watch_start(struct ib_uverbs_mmu_queue *queue, u64 start,
			  u64 length, u64 cookie)
{
	return ERR_PTR(-EOPNOTSUPP);
}

static inline void
ib_uverbs_mmu_watch_go_live(struct ib_uverbs_mmu_watch *watch)
{
}

static inline u32 ib_uverbs_mmu_watch_stop(struct ib_uverbs_mmu_watch *watch)
{
	return 0;
}
#endif

#endif /* UVERBS_MMU_NOTIFY_H */

// SPDX-License-Identifier: GPL-2.0
/*
 * Runs the sample of the manual (sample.c) on a kernel whose events the test
 * decides, and whose read() copies one event at a time.
 */
#define read kernel_read
#include "sample.c"
#undef read
#include <stdio.h>

#define CHECK(what) ((what) ? (void)0 : (printf("line %d: %s\n", __LINE__, #what), exit(1)))
#define ALL 8

static struct ib_uverbs_mmu_notify_page page;
static struct ib_uverbs_mmu_notify_event pending[ALL];
static size_t count;
static uint32_t delivered[ALL], handles;
static int reads, read_error, born_stale;

/* Queues an event; one that is pending takes the change in. */
static void invalidate(uint64_t cookie)
{
	for (size_t i = 0; i < count; i++)
		if (pending[i].cookie == cookie)
			return;
	pending[count].cookie = cookie;
	pending[count++].generation = page.generation + 1;
	__atomic_store_n(&page.generation, page.generation + 1, __ATOMIC_RELEASE);
}

ssize_t kernel_read(int fd, void *to, size_t room)
{
	struct ib_uverbs_mmu_notify_event *event = to;

	CHECK(fd == 3 && room >= sizeof(*event));
	reads++;
	errno = read_error ? read_error : EAGAIN;
	if (read_error || !count)
		return -1;
	*event = pending[0];
	for (size_t i = 1; i < count; i++)
		pending[i - 1] = pending[i];
	count--;
	delivered[((struct entry *)(uintptr_t)event->cookie)->handle]++;
	return sizeof(*event);
}

int reg_mr(struct entry *e, int fd, uint64_t cookie)
{
	CHECK(fd == 3);
	e->handle = handles++;
	if (born_stale)
		invalidate(cookie);
	return 0;
}

int dereg_mr(const struct entry *e, uint32_t *reported)
{
	size_t left = 0;

	for (size_t i = 0; i < count; i++)
		if (pending[i].cookie != (uintptr_t)e)
			pending[left++] = pending[i];
	count = left;
	*reported = delivered[e->handle];
	return 0;
}

bool covers(const struct entry *e, const void *addr, size_t length)
{
	return addr >= e->addr && (char *)addr + length <= (char *)e->addr + e->length;
}

/* What the sample leaves out. */
static void take_out(struct cache *c, struct entry *e)
{
	struct entry **link = &c->entries;

	while (*link != e)
		link = &(*link)->next;
	*link = e->next;
}

int main(void)
{
	static char memory[4][16];
	struct cache c = {
		.lock = PTHREAD_MUTEX_INITIALIZER, .fd = 3, .page = &page,
	};
	struct entry *a = cache_register(&c, memory[0], 16);
	struct entry *b = cache_register(&c, memory[1], 16);
	struct entry *d = cache_register(&c, memory[2], 16);
	struct ib_uverbs_mmu_notify_event in_hand;

	/* Without a change a lookup reads nothing. */
	CHECK(cache_find(&c, memory[0], 16) == a && cache_find(&c, memory[1] + 1, 8) == b);
	CHECK(entry_is_current(&c, a) && reads == 0);

	/* It reads until EAGAIN, not until a short count. */
	invalidate((uintptr_t)a);
	invalidate((uintptr_t)b);
	invalidate((uintptr_t)b);
	CHECK(!entry_is_current(&c, d));
	CHECK(!cache_find(&c, memory[1], 16) && !cache_find(&c, memory[0], 16));
	CHECK(cache_find(&c, memory[2], 16) == d && entry_is_current(&c, d));
	CHECK(!entry_is_current(&c, a) && reads == 3);

	/* After an error no entry is found, until a read() has said EAGAIN. */
	invalidate((uintptr_t)a);
	read_error = EIO;
	CHECK(!cache_find(&c, memory[2], 16) && !entry_is_current(&c, d));
	read_error = 0;
	CHECK(cache_find(&c, memory[2], 16) == d);

	/* Stale from birth, and a pending event that deregistration drops. */
	born_stale = 1;
	take_out(&c, a);
	cache_deregister(&c, a);
	a = cache_register(&c, memory[0], 16);
	CHECK(a->stale && !cache_find(&c, memory[0], 16));
	invalidate((uintptr_t)a);
	take_out(&c, a);
	cache_deregister(&c, a);
	CHECK(!count);

	/*
	 * Another reader has an event of d in hand: the object stays until it is
	 * seen. The address sanitizer finds it freed too early, or never.
	 */
	invalidate((uintptr_t)d);
	CHECK(kernel_read(3, &in_hand, sizeof(in_hand)) == sizeof(in_hand));
	take_out(&c, d);
	cache_deregister(&c, d);
	pending[count++] = in_hand;
	CHECK(d->deregistered && d->reported == 1);
	c.applied = 0;
	CHECK(!cache_find(&c, memory[2], 16) && !count);

	take_out(&c, b);
	cache_deregister(&c, b);
	CHECK(!c.entries);
	return 0;
}

// SPDX-License-Identifier: GPL-2.0
/*
 * cache [other|none] DEVICE: the registration cache of libfabric in a child of fork() and
 * after the device was removed, which this does; judged by the keys of the registrations.
 * With 'other' the domain must use the monitor of old libraries instead of MMU notification,
 * with 'none' no cache.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <err.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <rdma/fabric.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>

#define SIZE 65536

static const char *device;
static struct fid_domain *domain;
static int failed;

static void check(bool good, const char *what)
{
	printf("%s - %s\n", good ? "ok" : "not ok", what);
	fflush(stdout);
	failed |= !good;
}

static void must(int ret, const char *call)
{
	if (ret)
		errx(1, "%s: %s", call, fi_strerror(-ret));
}

static int try(void *buffer, struct fid_mr **mr)
{
	return fi_mr_reg(domain, buffer, SIZE, FI_SEND | FI_RECV | FI_READ | FI_REMOTE_READ,
			 0, 0, 0, mr, NULL);
}

static struct fid_mr *reg(void *buffer)
{
	struct fid_mr *mr;

	must(try(buffer, &mr), "fi_mr_reg");
	return mr;
}

/* Registers a buffer, changed or not, while the first MR is open. */
static bool same(struct fid_mr *first, void *buffer)
{
	struct fid_mr *mr = reg(buffer);
	bool same = fi_mr_key(mr) == fi_mr_key(first);

	must(fi_close(&mr->fid), "fi_close");
	return same;
}

static void *map(void)
{
	void *buffer = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (buffer == MAP_FAILED)
		err(1, "mmap");
	return memset(buffer, 1, SIZE);
}

static void change(void *buffer)
{
	if (syscall(SYS_madvise, buffer, SIZE, MADV_DONTNEED))
		err(1, "madvise");
	memset(buffer, 2, SIZE);
}

/* The MRs of userspace that the kernel has for the device. */
static int count(void)
{
	char command[64];
	int n = -1;
	FILE *f;

	snprintf(command, sizeof(command), "rdma resource show mr | grep -c ' %s '", device);
	f = popen(command, "r");
	if (!f || fscanf(f, "%d", &n) != 1)
		errx(1, "%s", command);
	pclose(f);
	return n;
}

static int channels(void)
{
	char path[512], target[64];
	DIR *dir = opendir("/proc/self/fd");
	struct dirent *entry;
	int n = 0;

	while ((entry = readdir(dir))) {
		snprintf(path, sizeof(path), "/proc/self/fd/%s", entry->d_name);
		memset(target, 0, sizeof(target));
		if (readlink(path, target, sizeof(target) - 1) > 0)
			n += !strcmp(target, "anon_inode:[infinibandmmunotify]");
	}
	closedir(dir);
	return n;
}

static void open_domain(void)
{
	struct fi_info *hints = fi_allocinfo(), *info;
	struct fid_fabric *fabric;

	hints->fabric_attr->prov_name = strdup("verbs");
	hints->domain_attr->name = strdup(device);
	hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_VIRT_ADDR;
	hints->ep_attr->type = FI_EP_MSG;
	hints->caps = FI_MSG | FI_RMA;
	must(fi_getinfo(FI_VERSION(1, 20), NULL, NULL, 0, hints, &info), "fi_getinfo");
	must(fi_fabric(info->fabric_attr, &fabric, NULL), "fi_fabric");
	must(fi_domain(fabric, info, &domain, NULL), "fi_domain");
}

static void in_child(char *idle, char *used, struct fid_mr *mr)
{
	struct fid_mr *own, *again;
	char *fresh = map();

	check(!same(mr, used), "a child does not use an MR of its parent");
	own = reg(idle);
	again = reg(idle);
	check(fi_mr_key(own) != fi_mr_key(again), "a child has no cache");
	change(idle);
	must(fi_close(&own->fid), "fi_close");
	must(fi_close(&again->fid), "fi_close");
	own = reg(fresh);
	must(fi_close(&own->fid), "fi_close");
}

static void forking(void)
{
	char *idle = map(), *used = map();
	struct fid_mr *first = reg(idle), *mr = reg(used);
	uint64_t key = fi_mr_key(first);
	int before, status;
	pid_t pid;

	must(fi_close(&first->fid), "fi_close");
	before = count();
	fflush(stdout);
	pid = fork();
	if (!pid) {
		failed = 0;
		in_child(idle, used, mr);
		_exit(failed);
	}
	check(waitpid(pid, &status, 0) == pid && !status, "the child has succeeded");
	check(before >= 2 && count() == before, "the parent's MRs are those of before");
	check(same(mr, used), "the parent has kept an MR in use");
	first = reg(idle);
	check(fi_mr_key(first) == key, "and one that was not");
	change(idle);
	check(!same(first, idle), "and sees changes");
	must(fi_close(&first->fid), "fi_close");
	must(fi_close(&mr->fid), "fi_close");
}

static void removal(void)
{
	char *idle = map(), *used = map(), *changed = map(), command[64];
	struct fid_mr *first = reg(idle), *mr = reg(used), *third = reg(changed), *late;

	must(fi_close(&first->fid), "fi_close");
	snprintf(command, sizeof(command), "rdma link delete %s", device);
	check(!system(command), "the device is removed");
	change(changed);
	check(try(idle, &late), "an MR in the cache is not used any longer");
	check(try(used, &late), "nor one in use");
	check(!fi_close(&mr->fid) && !fi_close(&third->fid), "MRs can be closed");
	check(!fi_close(&domain->fid), "and so can the domain");
}

int main(int argc, char **argv)
{
	const char *mode = argc == 3 ? argv[1] : "";
	bool other = !strcmp(mode, "other"), none = !strcmp(mode, "none");
	bool notify = !other && !none;
	struct fid_mr *mr;
	char *buffer;

	device = argv[argc - 1];
	open_domain();
	buffer = map();
	mr = reg(buffer);
	check(same(mr, buffer) == !none, none ? "there is no cache" : "there is a cache");
	check(channels() == notify, notify ? "with a channel" : "without a channel");
	change(buffer);
	if (!none)
		check(same(mr, buffer) == other, other ? "it does not see a raw system call" :
							 "it sees a raw system call");
	if (other) {
		if (madvise(buffer, SIZE, MADV_DONTNEED))
			err(1, "madvise");
		check(!same(mr, buffer), "it sees a call of libc");
	}
	must(fi_close(&mr->fid), "fi_close");
	if (notify) {
		forking();
		removal();
	}
	return failed;
}

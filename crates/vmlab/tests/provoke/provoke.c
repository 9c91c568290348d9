// SPDX-License-Identifier: GPL-2.0
/*
 * Damages the kernel that loads it, in the way that its parameter says: `insmod provoke.ko what=bug`.
 *
 * The consoles in src/events/tests were recorded with it.
 */
#include <linux/delay.h>
#include <linux/jiffies.h>
#include <linux/kthread.h>
#include <linux/list.h>
#include <linux/module.h>
#include <linux/mutex.h>
#include <linux/sched.h>
#include <linux/slab.h>
#include <linux/spinlock.h>

static char *what = "";
module_param(what, charp, 0);

static DEFINE_SPINLOCK(provoke_lock);
static DEFINE_MUTEX(provoke_mutex);

static noinline void provoke_warn(int n)
{
	WARN(n >= 0, "provoked number %d\n", n);
}

static noinline void provoke_bug(void)
{
	BUG();
}

static noinline void provoke_write(unsigned long address)
{
	OPTIMIZER_HIDE_VAR(address);
	*(volatile int *)address = 1;
}

static noinline void provoke_divide(void)
{
	asm volatile("xor %%ecx, %%ecx; mov $1, %%eax; xor %%edx, %%edx; divl %%ecx" ::: "eax", "ecx", "edx");
}

static noinline void provoke_int3(void)
{
	asm volatile("int3");
}

static noinline void provoke_atomic(void)
{
	spin_lock(&provoke_lock);
	schedule();
	spin_unlock(&provoke_lock);
}

static noinline void provoke_list(void)
{
	struct list_head head, entry;

	INIT_LIST_HEAD(&head);
	entry.next = &head;
	entry.prev = &entry;
	list_del(&entry);
}

static noinline void provoke_stack(int n)
{
	volatile char frame[512];

	frame[0] = n;
	if (n < 1000000)
		provoke_stack(n + 1);
	frame[1] = frame[0];
}

/* KFENCE looks at one allocation in each of its intervals. */
static noinline void provoke_kfence(void)
{
	int tries;

	for (tries = 0; tries < 2000; tries++) {
		char *p = kmalloc(64, GFP_KERNEL);

		kfree(p);
		(void)*(volatile char *)(p + 8);
		usleep_range(1000, 1200);
	}
}

static int provoke_sleeper(void *unused)
{
	mutex_lock(&provoke_mutex);
	mutex_unlock(&provoke_mutex);
	return 0;
}

static noinline void provoke_hung(void)
{
	mutex_lock(&provoke_mutex);
	kthread_run(provoke_sleeper, NULL, "provoke-sleeper");
	msleep(15000);
	mutex_unlock(&provoke_mutex);
}

static noinline void provoke_soft(void)
{
	unsigned long end = jiffies + 15 * HZ;

	preempt_disable();
	while (time_before(jiffies, end))
		cpu_relax();
	preempt_enable();
}

static int __init provoke_init(void)
{
	if (!strcmp(what, "warn"))
		provoke_warn(7);
	else if (!strcmp(what, "bug"))
		provoke_bug();
	else if (!strcmp(what, "null"))
		provoke_write(0);
	else if (!strcmp(what, "page"))
		provoke_write(0xffffc8f000000000ul);
	else if (!strcmp(what, "general-protection"))
		provoke_write(0xdead000000000100ul);
	else if (!strcmp(what, "divide"))
		provoke_divide();
	else if (!strcmp(what, "int3"))
		provoke_int3();
	else if (!strcmp(what, "atomic"))
		provoke_atomic();
	else if (!strcmp(what, "list"))
		provoke_list();
	else if (!strcmp(what, "stack"))
		provoke_stack(0);
	else if (!strcmp(what, "kfence"))
		provoke_kfence();
	else if (!strcmp(what, "hung"))
		provoke_hung();
	else if (!strcmp(what, "soft"))
		provoke_soft();
	else if (!strcmp(what, "panic"))
		panic("provoked %d", 7);
	/* It need not be unloaded. */
	return -EAGAIN;
}
module_init(provoke_init);

MODULE_LICENSE("GPL");

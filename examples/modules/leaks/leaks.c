// SPDX-License-Identifier: GPL-2.0
// A module that keeps what it should give back: memory, and a file in /proc.
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/slab.h>

static void *buffers[3];

static noinline void leaks_allocate(void)
{
	int i;

	for (i = 0; i < 3; i++)
		buffers[i] = kmalloc(1000, GFP_KERNEL);
}

static int __init leaks_init(void)
{
	leaks_allocate();
	/* A directory has no code behind it that could be missing later. */
	if (!proc_mkdir("leaks", NULL))
		return -ENOMEM;
	return 0;
}

static void __exit leaks_exit(void)
{
	/* One of three, and not the directory. */
	kfree(buffers[0]);
}

module_init(leaks_init);
module_exit(leaks_exit);
MODULE_DESCRIPTION("A module that keeps what it should give back");
MODULE_LICENSE("GPL");

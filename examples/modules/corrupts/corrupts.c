// SPDX-License-Identifier: GPL-2.0
// A module that removes an entry of a list twice, when its parameter `now` is written to.
#include <linux/list.h>
#include <linux/module.h>
#include <linux/slab.h>

struct entry {
	struct list_head list;
};

static LIST_HEAD(entries);

static noinline void corrupts_remove_twice(void)
{
	struct entry *entry = kmalloc(sizeof(*entry), GFP_KERNEL);

	if (!entry)
		return;
	list_add(&entry->list, &entries);
	list_del(&entry->list);
	list_del(&entry->list);
	kfree(entry);
}

static int corrupts_set(const char *value, const struct kernel_param *parameter)
{
	corrupts_remove_twice();
	return 0;
}

static const struct kernel_param_ops corrupts_ops = { .set = corrupts_set };

module_param_cb(now, &corrupts_ops, NULL, 0200);
MODULE_PARM_DESC(now, "corrupts a list when it is written to");

static int __init corrupts_init(void)
{
	return 0;
}

static void __exit corrupts_exit(void)
{
}

module_init(corrupts_init);
module_exit(corrupts_exit);
MODULE_DESCRIPTION("A module that corrupts a list");
MODULE_LICENSE("GPL");

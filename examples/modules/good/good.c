// SPDX-License-Identifier: GPL-2.0
// A module that is as it should be: a file in /proc whose number can be read and written.
#include <linux/module.h>
#include <linux/proc_fs.h>
#include <linux/seq_file.h>
#include <linux/slab.h>
#include <linux/uaccess.h>

static int start = 42;
module_param(start, int, 0444);
MODULE_PARM_DESC(start, "the number that is there at first");

static int *number;

static int good_show(struct seq_file *file, void *unused)
{
	seq_printf(file, "%d\n", *number);
	return 0;
}

static int good_open(struct inode *inode, struct file *file)
{
	return single_open(file, good_show, NULL);
}

static ssize_t good_write(struct file *file, const char __user *text, size_t length, loff_t *at)
{
	int value, error = kstrtoint_from_user(text, length, 0, &value);

	if (error)
		return error;
	*number = value;
	pr_debug("good: the number is %d now\n", value);
	return length;
}

static const struct proc_ops good_ops = {
	.proc_open = good_open,
	.proc_read = seq_read,
	.proc_write = good_write,
	.proc_lseek = seq_lseek,
	.proc_release = single_release,
};

static int __init good_init(void)
{
	number = kmalloc(sizeof(*number), GFP_KERNEL);
	if (!number)
		return -ENOMEM;
	*number = start;
	if (!proc_create("good", 0600, NULL, &good_ops)) {
		kfree(number);
		return -ENOMEM;
	}
	pr_info("good: loaded\n");
	return 0;
}

static void __exit good_exit(void)
{
	remove_proc_entry("good", NULL);
	kfree(number);
}

module_init(good_init);
module_exit(good_exit);
MODULE_DESCRIPTION("A module that is as it should be");
MODULE_LICENSE("GPL");

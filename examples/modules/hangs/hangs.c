// SPDX-License-Identifier: GPL-2.0
// A module that waits for ever when it is unloaded.
#include <linux/completion.h>
#include <linux/module.h>

static DECLARE_COMPLETION(done);

static noinline void hangs_wait(void)
{
	/* Nobody completes it. */
	wait_for_completion(&done);
	pr_info("hangs: it was completed\n");
}

static int __init hangs_init(void)
{
	return 0;
}

static void __exit hangs_exit(void)
{
	hangs_wait();
	pr_info("hangs: unloaded\n");
}

module_init(hangs_init);
module_exit(hangs_exit);
MODULE_DESCRIPTION("A module that waits for ever when it is unloaded");
MODULE_LICENSE("GPL");

// SPDX-License-Identifier: GPL-2.0
// A module that writes to a NULL pointer when it is loaded.
#include <linux/module.h>

struct settings {
	char name[64];
	int size;
};

static struct settings *settings;

static noinline void oopses_configure(struct settings *settings)
{
	settings->size = 1;
}

static int __init oopses_init(void)
{
	oopses_configure(READ_ONCE(settings));
	return 0;
}

static void __exit oopses_exit(void)
{
}

module_init(oopses_init);
module_exit(oopses_exit);
MODULE_DESCRIPTION("A module that writes to a NULL pointer");
MODULE_LICENSE("GPL");

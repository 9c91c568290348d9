// SPDX-License-Identifier: GPL-2.0
// Tests the module from C, and tells of it as kselftest's programs do.
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

static int at(const char *text, int fd)
{
	char read_back[32] = "";

	if (write(fd, text, strlen(text)) != (ssize_t)strlen(text))
		return 0;
	lseek(fd, 0, SEEK_SET);
	return read(fd, read_back, sizeof(read_back) - 1) > 0 && !strcmp(text, read_back);
}

int main(void)
{
	int fd = open("/proc/good", O_RDWR), failed = 0;

	printf("TAP version 13\n1..3\n");
	printf("%s 1 - the file is there\n", fd >= 0 ? "ok" : "not ok");
	failed |= fd < 0;
	printf("%s 2 - a number\n", at("12\n", fd) ? "ok" : (failed = 1, "not ok"));
	printf("%s 3 - a negative number\n", at("-3\n", fd) ? "ok" : (failed = 1, "not ok"));
	return failed;
}

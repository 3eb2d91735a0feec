// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * pmem - inspect and prepare the nvdimms of a guest, in one round trip.
 *
 *	pmem [NAME=VALUE...] STEP...
 *
 * Prints lines for paprscm/pmem/dump.py:
 *
 *	found REGION NODE DEVICE   one for each region; NODE is "-" if it is unknown
 *	text KEY VALUE             the first line of a file, or a fact
 *	blob KEY                   followed by lines with its content in hex, " 00 01"
 *	file SIZE MODE NAME        a property in the blob "props", in order; or the path of another file
 *	step STEP                  this step begins
 *	done                       all steps succeeded
 *
 * The steps are the functions step_*() below. Settings, a missing or empty one being the default:
 * drc (hex) and wait_ms of the step "find"; ns_mode, ns_map, ns_size, ns_align of a namespace; disk,
 * fstype, block_size (the page size), mkfs_configs (folder of mkfs.xfs's configuration files),
 * mountpoint, options; table, the last 66 bytes of an MBR in hex; sysfs, its mount point.
 *
 * Exit status: 3 if no region has that DRC index, that of a program that failed, with 128 added to a
 * signal, and otherwise see report.h.
 *
 * A program under TCG takes longer to start than to run; so this runs only those that it must.
 */
#include "report.h"

#include <dirent.h>
#include <glob.h>
#include <limits.h>
#include <mntent.h>
#include <stdarg.h>
#include <sys/mount.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <sys/wait.h>

const char tool_name[] = "pmem";
const char usage_text[] = "usage: pmem [NAME=VALUE...] STEP...\n";

enum { EXIT_NO_REGION = 3, EXIT_NOT_EXECUTABLE = 126, EXIT_NO_PROGRAM, EXIT_SIGNAL };

/* arch/powerpc/platforms/pseries/papr_scm.c: the node of an nvdimm, and its parent. */
#define PARENT "ibm,persistent-memory"
#define NVDIMM "ibm,pmemory"

static const char *sysfs;
static char **settings;
/* Of the step "find": the region's name, its path and that of its node. */
static char *region, *device, *node;
/* Of the steps that find or make a namespace; of others, the setting. */
static const char *disk;

static void __attribute__((noreturn, format(printf, 1, 2))) give_up(const char *format, ...)
{
	va_list values;

	va_start(values, format);
	vfprintf(stderr, format, values);
	va_end(values);
	fputc('\n', stderr);
	exit(EXIT_WRONG);
}

static char *__attribute__((format(printf, 1, 2))) text(const char *format, ...)
{
	va_list values;
	char *made;

	va_start(values, format);
	if (vasprintf(&made, format, values) < 0)
		fail("memory");
	va_end(values);
	return made;
}

static const char *setting_or(const char *name, const char *otherwise)
{
	size_t length = strlen(name);

	for (char **at = settings; *at && strchr(*at, '='); at++)
		if (!strncmp(*at, name, length) && (*at)[length] == '=' && (*at)[length + 1])
			return *at + length + 1;
	return otherwise;
}

static const char *setting(const char *name)
{
	return setting_or(name, "");
}

/* --- files ----------------------------------------------------------------------------------- */

/* The first line of a file, without its end, or NULL. A file that cannot be read is empty. */
static char *first_line(const char *path)
{
	FILE *file = fopen(path, "re");
	char *line = NULL;
	size_t room = 0;

	if (!file)
		return access(path, F_OK) ? NULL : text("%s", "");
	if (getline(&line, &room, file) < 0)
		line = text("%s", "");
	fclose(file);
	line[strcspn(line, "\n")] = 0;
	return line;
}

static void print_text(const char *key, const char *value)
{
	printf("text %s %s\n", key, value);
}

/* Print the first line of each file that exists. */
static void print_lines(const char *prefix, const char *folder, const char *const *names)
{
	for (; *names; names++) {
		char *line = first_line(text("%s/%s", folder, *names));

		if (line)
			print_text(text("%s%s", prefix, *names), line);
	}
}

/* The paths that match, in alphabetical order. */
static glob_t find_paths(const char *pattern)
{
	glob_t paths;

	if (glob(pattern, 0, NULL, &paths))
		paths.gl_pathc = 0;
	return paths;
}

static void print_hex(const void *data, size_t size)
{
	const unsigned char *bytes = data;

	for (size_t i = 0; i < size; i++)
		printf(" %02x", bytes[i]);
	if (size)
		putchar('\n');
}

static void print_content(const char *path)
{
	FILE *file = fopen(path, "re");
	char chunk[4096];
	size_t size;

	if (!file)
		fail(path);
	while ((size = fread(chunk, 1, sizeof(chunk), file)) > 0)
		print_hex(chunk, size);
	if (ferror(file))
		fail(path);
	fclose(file);
}

static void print_status(const char *path, const char *name)
{
	struct stat status;

	if (stat(path, &status))
		fail(path);
	printf("file %lld %o %s\n", (long long)status.st_size, status.st_mode & 07777, name);
}

static char *base_name(const char *path)
{
	char *slash = strrchr(path, '/');

	return slash ? slash + 1 : (char *)path;
}

/* --- programs -------------------------------------------------------------------------------- */

/* Run a program, of which words end at NULL; end with its status if it fails. Its output goes to
 * stderr, or is returned if `keep`. */
static char *run(char *const *words, bool keep)
{
	char *output = NULL;
	size_t size = 0;
	int ends[2], status;
	FILE *pipe_end, *kept;
	pid_t pid;

	if (fflush(stdout) || pipe2(ends, O_CLOEXEC))
		fail("pipe");
	pid = fork();
	if (pid < 0)
		fail("fork");
	if (!pid) {
		dup2(keep ? ends[1] : STDERR_FILENO, STDOUT_FILENO);
		execvp(words[0], words);
		status = errno == ENOENT ? EXIT_NO_PROGRAM : EXIT_NOT_EXECUTABLE;
		print_error(words[0]);
		_exit(status);
	}
	close(ends[1]);
	pipe_end = fdopen(ends[0], "r");
	kept = open_memstream(&output, &size);
	if (!pipe_end || !kept)
		fail("memory");
	for (int c; (c = getc(pipe_end)) != EOF;)
		putc(c, kept);
	fclose(pipe_end);
	if (fclose(kept))
		fail("memory");
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			fail("waitpid");
	if (status)
		exit(WIFEXITED(status) ? WEXITSTATUS(status) : EXIT_SIGNAL + WTERMSIG(status));
	return output;
}

/* --- regions --------------------------------------------------------------------------------- */

/* The path of a region's node, or NULL. */
static char *find_node(const char *here)
{
	char *at = realpath(text("%s/of_node", here), NULL), *provider, *colon;

	if (at)
		return at;
	/* Without this link, the name of the region's bus contains the node's path. */
	provider = first_line(text("%s/../provider", here));
	colon = provider ? strchr(provider, ':') : NULL;
	if (!colon)
		return NULL;
	*colon = 0;
	return realpath(text("%s/firmware/devicetree/base/%s/%s", sysfs, provider, colon + 1),
			NULL);
}

/* Set region, device and node. `found` becomes the lines of all regions, and `trouble` a reason. */
static bool look(char **found, char **trouble)
{
	char *name = text("/" PARENT "/" NVDIMM "@%s", setting("drc"));
	size_t size, length = strlen(name);
	FILE *lines = open_memstream(found, &size);
	glob_t regions = find_paths(text("%s/bus/nd/devices/region*", sysfs));

	if (!lines)
		fail("memory");
	*trouble = region = device = node = NULL;
	for (size_t i = 0; i < regions.gl_pathc; i++) {
		char *here = realpath(regions.gl_pathv[i], NULL),
		     *at = here ? find_node(here) : NULL;

		/* It was removed meanwhile. */
		if (!here)
			continue;
		fprintf(lines, "found %s %s %s\n", base_name(here), at ? at : "-", here);
		if (!at || strlen(at) < length || strcmp(at + strlen(at) - length, name))
			continue;
		if (region)
			*trouble = text("both %s and %s are of drc %s", region, base_name(here),
					setting("drc"));
		region = base_name(here);
		device = here;
		node = at;
	}
	fclose(lines);
	if (region && access(text("%s/driver", device), F_OK))
		*trouble = text("%s has no driver", region);
	return region && !*trouble;
}

static int is_property(const struct dirent *entry)
{
	return entry->d_type == DT_REG;
}

/* Print the device tree node's properties, and the mode of the region's file deep_flush. */
static void print_properties(void)
{
	const char *flush = text("%s/deep_flush", device);
	struct dirent **entries;
	int count = scandir(node, &entries, is_property, alphasort);

	if (count < 0)
		fail(node);
	for (int i = 0; i < count; i++)
		print_status(text("%s/%s", node, entries[i]->d_name), entries[i]->d_name);
	if (!access(flush, F_OK))
		print_status(flush, flush);
	puts("blob props");
	for (int i = 0; i < count; i++)
		print_content(text("%s/%s", node, entries[i]->d_name));
}

static void step_find(void)
{
	static const char *const region_files[] = {
		"deep_flush", "persistence_domain", "size", "read_only", "align",
		"nstype",     "mapping0",	    NULL,
	};
	static const char *const dimm_files[] = { "flags", "papr/flags", "papr/dirty_shutdown",
						  NULL };
	uint64_t end = now_ns() +
		       parse_number("wait_ms", setting_or("wait_ms", "0"), 0, 3600000) * 1000000;
	char *found, *trouble, *mapping;

	while (!look(&found, &trouble)) {
		if (now_ns() >= end) {
			fputs(found, stdout);
			if (trouble)
				print_text("trouble", trouble);
			exit(EXIT_NO_REGION);
		}
		/* No event tells when libnvdimm has probed a region. */
		usleep(20000);
	}
	fputs(found, stdout);
	/* This read returns when the bus has probed all its devices. */
	print_lines("", text("%s/..", device), (const char *const[]){ "wait_probe", NULL });
	print_text("region", region);
	print_text("device", device);
	print_text("node", node);
	print_lines("", device, region_files);
	/* "nmem0,0,536870912,0" */
	mapping = first_line(text("%s/mapping0", device));
	if (mapping)
		print_lines("",
			    text("%s/bus/nd/devices/%.*s", sysfs, (int)strcspn(mapping, ","),
				 mapping),
			    dimm_files);
	print_properties();
}

/* --- namespaces ------------------------------------------------------------------------------ */

/* Print the sysfs attributes of a device, and set disk. Never make a file system on a device of
 * another region: its path `at` must be below this region. */
static void place(const char *name, const char *at)
{
	size_t length = strlen(device);

	print_text(text("%s/device", name), at);
	if (strncmp(at, device, length) || at[length] != '/')
		give_up("%s is %s, which is not below %s", name, at, device);
	disk = text("/dev/%s", name);
}

static void print_device(const char *name)
{
	static const char *const block_files[] = {
		"ro",
		"size",
		"queue/fua",
		"queue/dax",
		"queue/write_cache",
		"queue/logical_block_size",
		NULL,
	};
	static const char *const character_files[] = { "size", "align", NULL };
	const char *at = text("%s/block/%s", sysfs, name), *prefix = text("%s/", name);
	char *folder;

	if (!access(at, F_OK)) {
		print_lines(prefix, at, block_files);
		folder = realpath(text("%s/device", at), NULL);
		if (!folder)
			fail(at);
		place(name, folder);
		return;
	}
	folder = realpath(text("%s/bus/dax/devices/%s", sysfs, name), NULL);
	if (!folder)
		give_up("sysfs has no %s", name);
	print_lines(prefix, folder, character_files);
	place(name, folder);
}

/* The value of `"key": "value"` if that is at this quotation mark, or NULL. */
static char *json_value(const char *at, const char *key)
{
	size_t length = strlen(key);

	if (strncmp(at + 1, key, length) || at[length + 1] != '"')
		return NULL;
	at += length + 2;
	at += strspn(at, " ");
	if (*at++ != ':')
		return NULL;
	at += strspn(at, " ");
	return *at == '"' ? text("%.*s", (int)strcspn(at + 1, "\""), at + 1) : NULL;
}

/* Print ndctl's output, and the sysfs attributes of each device in it; return their number. */
static int print_devices(const char *listed)
{
	int count = 0;

	puts("blob ndctl");
	print_hex(listed, strlen(listed));
	for (const char *at = listed; (at = strchr(at, '"')); at++) {
		char *name = json_value(at, "blockdev");

		if (!name)
			name = json_value(at, "chardev");
		if (!name)
			continue;
		print_device(name);
		count++;
	}
	return count;
}

/* Create a namespace; ndctl's default for each setting that is empty. */
static void step_namespace(void)
{
	static const struct {
		char *option;
		const char *setting;
	} options[] = {
		{ "-m", "ns_mode" }, { "-M", "ns_map" }, { "-s", "ns_size" }, { "-a", "ns_align" }
	};
	char *words[5 + 2 * LENGTH(options) + 1] = { "ndctl", "create-namespace", "-f", "-r",
						     region };
	size_t count = 5;
	int devices;

	for (size_t i = 0; i < LENGTH(options); i++)
		if (*setting(options[i].setting)) {
			words[count++] = options[i].option;
			words[count++] = (char *)setting(options[i].setting);
		}
	devices = print_devices(run(words, true));
	if (devices != 1)
		give_up("ndctl lists %d devices, not one", devices);
}

static void step_namespaces(void)
{
	print_devices(run((char *[]){ "ndctl", "list", "-N", "-r", region, NULL }, true));
}

/* Find the only namespace of mode ns_mode, in sysfs. */
static void step_present(void)
{
	static const struct {
		const char *mode, *devices;
	} modes[] = { { "raw", "namespace*/block/*" },
		      { "sector", "btt*/block/*" },
		      { "fsdax", "pfn*/block/*" },
		      { "devdax", "dax*/dax[0-9]*" } };
	static const char *const owner_files[] = { "namespace", "mode", "uuid", NULL };
	const char *mode = setting("ns_mode"), *pattern = NULL;
	char *owner, *name;
	glob_t paths;

	for (size_t i = 0; i < LENGTH(modes); i++)
		if (!strcmp(mode, modes[i].mode))
			pattern = modes[i].devices;
	if (!pattern)
		usage("no mode", mode);
	paths = find_paths(text("%s/%s", device, pattern));
	if (paths.gl_pathc != 1)
		give_up("%s has %zu %s namespaces, not one", region, paths.gl_pathc, mode);
	owner = paths.gl_pathv[0];
	name = text("%s", base_name(owner));
	/* Remove the device's name, and "block". */
	*strrchr(owner, '/') = 0;
	if (strcmp(mode, "devdax"))
		*strrchr(owner, '/') = 0;
	print_text("present_owner", base_name(owner));
	print_lines("present_", owner, owner_files);
	print_text("present_device", name);
	print_device(name);
}

/* --- file systems ---------------------------------------------------------------------------- */

/* Write back all data to the DIMM. */
static void step_sync(void)
{
	sync();
}

/* 6012 for "6.12.117-rc1+", 0 for what does not begin with two numbers. */
static unsigned int version_number(const char *version)
{
	unsigned int major, minor;

	return sscanf(version, "%u.%u", &major, &minor) == 2 ? major * 1000 + minor : 0;
}

/*
 * mkfs.xfs's configuration file for this kernel, or NULL. By default, a mkfs.xfs newer than the
 * kernel may use features that the kernel cannot mount; it has a file with the defaults of each
 * long-term kernel. A mkfs.xfs that is not newer gets no file: the one of xfsprogs 6.1.0 for Linux
 * 6.1 is broken.
 */
static char *choose_features(void)
{
	const char *configs = setting_or("mkfs_configs", "/usr/share/xfsprogs/mkfs");
	char *said = run((char *[]){ "mkfs.xfs", "-V", NULL }, true), *chosen = NULL;
	char *word = strrchr(said, ' ');
	unsigned int own = version_number(word ? word + 1 : said), kernel, newest = 0;
	struct utsname names;
	glob_t files;

	if (!own)
		give_up("mkfs.xfs -V: %s", said);
	if (uname(&names))
		fail("uname");
	kernel = version_number(names.release);
	if (own <= kernel)
		return NULL;
	files = find_paths(text("%s/lts_[0-9]*.conf", configs));
	for (size_t i = 0; i < files.gl_pathc; i++) {
		unsigned int file = version_number(base_name(files.gl_pathv[i]) + strlen("lts_"));

		if (file <= kernel && file > newest) {
			newest = file;
			chosen = files.gl_pathv[i];
		}
	}
	return chosen;
}

static void step_filesystem(void)
{
	const char *fstype = setting("fstype"), *block_size = setting("block_size");

	if (!*block_size)
		block_size = text("%ld", sysconf(_SC_PAGESIZE));
	if (!strcmp(fstype, "xfs")) {
		char *features = choose_features(), *size = text("size=%s", block_size);
		char *option = features ? text("options=%s", features) : NULL;

		if (features)
			run((char *[]){ "mkfs.xfs", "-q", "-f", "-c", option, "-b", size,
					(char *)disk, NULL },
			    false);
		else
			run((char *[]){ "mkfs.xfs", "-q", "-f", "-b", size, (char *)disk, NULL },
			    false);
	} else if (!strcmp(fstype, "ext4")) {
		/* Not lazily: the kernel would keep writing and flushing in the background. */
		run((char *[]){ "mkfs.ext4", "-q", "-F", "-b", (char *)block_size, "-E",
				"lazy_itable_init=0,lazy_journal_init=0", (char *)disk, NULL },
		    false);
	} else {
		usage("no mkfs", fstype);
	}
}

static void make_folders(const char *path)
{
	char *part = text("%s", path);

	for (char *slash = part; (slash = strchr(slash + 1, '/')); *slash = '/') {
		*slash = 0;
		mkdir(part, 0755);
	}
	if (mkdir(part, 0755) && errno != EEXIST)
		fail(path);
}

/* mount(2) with options as in fstab; 0 or an errno. */
static int try_to_mount(void)
{
	static const struct {
		const char *word;
		unsigned long flag;
	} flags[] = { { "rw", 0 },
		      { "ro", MS_RDONLY },
		      { "remount", MS_REMOUNT },
		      { "noatime", MS_NOATIME },
		      { "sync", MS_SYNCHRONOUS },
		      { "nodev", MS_NODEV },
		      { "nosuid", MS_NOSUID },
		      { "noexec", MS_NOEXEC } };
	char *words = text("%s", setting("options")), *data = "", *word;
	unsigned long flag = 0;

	while ((word = strsep(&words, ","))) {
		size_t i = 0;

		while (i < LENGTH(flags) && strcmp(word, flags[i].word))
			i++;
		if (i < LENGTH(flags))
			flag |= flags[i].flag;
		else
			data = text("%s%s%s", data, *data ? "," : "", word);
	}
	make_folders(setting("mountpoint"));
	return mount(disk, setting("mountpoint"), setting("fstype"), flag, data) ? errno : 0;
}

static void step_mount(void)
{
	char *mountpoint, *source = NULL, *type = NULL, *options = NULL;
	struct statvfs status;
	struct mntent *entry;
	int error = try_to_mount();
	FILE *table;

	if (error)
		give_up("mount %s: %d %s", disk, error, errno_name(error));
	mountpoint = realpath(setting("mountpoint"), NULL);
	if (!mountpoint || statvfs(mountpoint, &status))
		fail(setting("mountpoint"));
	table = setmntent("/proc/self/mounts", "re");
	if (!table)
		fail("/proc/self/mounts");
	while ((entry = getmntent(table)))
		if (!strcmp(entry->mnt_dir, mountpoint)) {
			source = text("%s", entry->mnt_fsname);
			type = text("%s", entry->mnt_type);
			options = text("%s", entry->mnt_opts);
		}
	if (!source)
		give_up("%s is not in /proc/self/mounts", mountpoint);
	printf("text page_size %ld\n", sysconf(_SC_PAGESIZE));
	printf("text block_size %lu\n", status.f_frsize);
	print_text("mountpoint", mountpoint);
	print_text("mount_device", source);
	print_text("mount_fstype", type);
	print_text("mount_options", options);
}

/* Print the errno of mount(2), empty if it succeeds, and the kernel's messages. */
static void step_try_mount(void)
{
	int log = open_log(), error = try_to_mount(), level;
	const char *message;

	print_text("mount_errno", error ? errno_name(error) : "");
	puts("blob messages");
	while ((message = next_message(log, &level))) {
		print_hex(message, strlen(message));
		print_hex("\n", 1);
	}
}

static void step_partition(void)
{
	static const char *const part_files[] = { "start", "size", NULL };
	const char *table = setting("table"), *name = base_name(disk);
	uint8_t sector[512] = { 0 };
	int fd = open(disk, O_WRONLY | O_CLOEXEC);
	glob_t parts;

	for (size_t at = 446; at < sizeof(sector); at++, table += 2)
		if (sscanf(table, "%2hhx", &sector[at]) != 1)
			usage("no table", setting("table"));
	if (fd < 0 || write(fd, sector, sizeof(sector)) != sizeof(sector) || fsync(fd) || close(fd))
		fail(disk);
	/* BLKPG for each entry: the kernel may lack support for partition tables. */
	run((char *[]){ "partx", "--add", (char *)disk, NULL }, false);
	parts = find_paths(text("%s/block/%s/%sp*", sysfs, name, name));
	for (size_t i = 0; i < parts.gl_pathc; i++)
		print_lines(text("%s/", base_name(parts.gl_pathv[i])), parts.gl_pathv[i],
			    part_files);
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*act)(void);
	} steps[] = { { "find", step_find },
		      { "namespace", step_namespace },
		      { "namespaces", step_namespaces },
		      { "present", step_present },
		      { "filesystem", step_filesystem },
		      { "mount", step_mount },
		      { "try_mount", step_try_mount },
		      { "partition", step_partition },
		      { "sync", step_sync } };

	settings = argv + 1;
	sysfs = setting_or("sysfs", "/sys");
	disk = setting("disk");
	for (int word = 1; word < argc; word++) {
		size_t i = 0;

		if (strchr(argv[word], '='))
			continue;
		while (i < LENGTH(steps) && strcmp(argv[word], steps[i].name))
			i++;
		if (i == LENGTH(steps))
			usage("no step", argv[word]);
		printf("step %s\n", argv[word]);
		steps[i].act();
	}
	puts("done");
	if (fflush(stdout) || ferror(stdout)) {
		print_error("cannot write the report");
		return EXIT_NO_REPORT;
	}
	return EXIT_FINE;
}

// SPDX-License-Identifier: GPL-2.0-or-later
/*
 * databases - commit transactions in SQLite and LMDB, and check the databases after a power cut.
 *
 *	databases run KIND LIBRARY FILE COUNTER COUNT
 *	databases check KIND LIBRARY FILE [KIND LIBRARY FILE]...
 *
 * KIND is one of
 *
 *	sqlite-wal      SQLite with a write-ahead log, checkpoints every 8 pages, synchronous=FULL
 *	sqlite-delete   SQLite with a rollback journal, synchronous=EXTRA: with FULL, the removal of
 *	                the journal, which commits a transaction, is not durable
 *	lmdb            LMDB with write(2)
 *	lmdb-map        LMDB that stores into a shared mapping (MDB_WRITEMAP)
 *
 * LIBRARY is the path of the library, which needs no headers here. `run` makes the database if
 * COUNT is 0, else it commits COUNT transactions; after each it adds 1 to the first word of
 * COUNTER, a DAX device. Transaction number n adds row n, removes row n - 5, and sets the last
 * number to n. Row n consists of 100 + n * 997 % 5000 equal letters.
 *
 * `check` reports for each database its last number, and an error: empty if it can be opened,
 * passes its own check, and has exactly the rows of that number.
 *
 * Exit status: see report.h; never 1.
 */
#include "report.h"

#include <dlfcn.h>
#include <sys/mman.h>

const char tool_name[] = "databases";
const char usage_text[] = "usage: databases run KIND LIBRARY FILE COUNTER COUNT\n"
			  "       databases check KIND LIBRARY FILE...\n";

#define KEPT 5
#define COUNTER_SIZE (2UL << 20)
#define MAP_SIZE (32UL << 20)

static char error[512];

static bool failed(const char *what, const char *why)
{
	snprintf(error, sizeof(error), "%s: %s", what, why);
	return false;
}

static void *symbol(void *library, const char *name)
{
	void *found = library ? dlsym(library, name) : NULL;

	if (!found) {
		fprintf(stderr, "databases: %s\n", dlerror());
		exit(EXIT_FAILED);
	}
	return found;
}

static uint64_t length_of(uint64_t row)
{
	return 100 + row * 997 % 5000;
}

static char letter_of(uint64_t row)
{
	return (char)('A' + row % 26);
}

/* SQLite: sqlite3.h has these prototypes. */

static int (*sqlite3_open)(const char *, void **);
static int (*sqlite3_exec)(void *, const char *, int (*)(void *, int, char **, char **), void *,
			   char **);
static int (*sqlite3_close)(void *);
static const char *(*sqlite3_errmsg)(void *);

static int first_value(void *target, int count, char **values, char **names)
{
	(void)names;
	if (count && values[0])
		snprintf(target, 256, "%s", values[0]);
	return 0;
}

/* The first value of a statement's last row is in answer, which has 256 bytes. */
static bool sql(void *db, const char *text, char *answer)
{
	answer[0] = '\0';
	return !sqlite3_exec(db, text, first_value, answer, NULL) ||
	       failed(text, sqlite3_errmsg(db));
}

static void *sqlite(const char *kind, void *library, const char *file)
{
	bool wal = !strcmp(kind, "sqlite-wal");
	char answer[256];
	void *db;

	sqlite3_open = symbol(library, "sqlite3_open");
	sqlite3_exec = symbol(library, "sqlite3_exec");
	sqlite3_close = symbol(library, "sqlite3_close");
	sqlite3_errmsg = symbol(library, "sqlite3_errmsg");
	if (sqlite3_open(file, &db)) {
		failed("open", sqlite3_errmsg(db));
		return NULL;
	}
	if (!sql(db, wal ? "PRAGMA journal_mode=WAL" : "PRAGMA journal_mode=DELETE", answer) ||
	    !sql(db, wal ? "PRAGMA synchronous=FULL" : "PRAGMA synchronous=EXTRA", answer) ||
	    !sql(db, "PRAGMA wal_autocheckpoint=8", answer))
		return NULL;
	return db;
}

static bool sqlite_make(void *db)
{
	char answer[256];

	return sql(db,
		   "CREATE TABLE last (n INTEGER); INSERT INTO last VALUES (0);"
		   "CREATE TABLE rows (n INTEGER PRIMARY KEY, content TEXT)",
		   answer);
}

static bool sqlite_commit(void *db, uint64_t row)
{
	char text[512], answer[256];

	snprintf(text, sizeof(text),
		 "BEGIN; INSERT INTO rows VALUES (%" PRIu64 ", printf('%%.*c', %" PRIu64
		 ", '%c')); DELETE FROM rows WHERE n + %d <= %" PRIu64
		 "; UPDATE last SET n = %" PRIu64 "; COMMIT",
		 row, length_of(row), letter_of(row), KEPT, row, row);
	return sql(db, text, answer);
}

static bool sqlite_check(void *db, uint64_t *last)
{
	char answer[256], text[512];

	if (!sql(db, "PRAGMA integrity_check", answer))
		return false;
	if (strcmp(answer, "ok"))
		return failed("integrity_check", answer);
	if (!sql(db, "SELECT n FROM last", answer))
		return false;
	*last = strtoull(answer, NULL, 10);
	snprintf(text, sizeof(text),
		 "SELECT count(*) = min(%" PRIu64 ", %d) AND coalesce(max(n), 0) = %" PRIu64
		 " AND coalesce(sum(content = printf('%%.*c', 100 + n * 997 %% 5000, "
		 "char(65 + n %% 26))), 0) = count(*) FROM rows",
		 *last, KEPT, *last);
	return sql(db, text, answer) &&
	       (!strcmp(answer, "1") || failed("rows", "not as committed"));
}

/* LMDB: lmdb.h has these prototypes and numbers. */

struct value {
	size_t size;
	void *data;
};

#define MDB_NOSUBDIR 0x4000
#define MDB_WRITEMAP 0x80000
#define MDB_FIRST 0
#define MDB_NEXT 8
#define MDB_NOTFOUND (-30798)

static int (*mdb_env_create)(void **);
static int (*mdb_env_set_mapsize)(void *, size_t);
static int (*mdb_env_open)(void *, const char *, unsigned int, mode_t);
static int (*mdb_txn_begin)(void *, void *, unsigned int, void **);
static int (*mdb_txn_commit)(void *);
static int (*mdb_dbi_open)(void *, const char *, unsigned int, unsigned int *);
static int (*mdb_put)(void *, unsigned int, struct value *, struct value *, unsigned int);
static int (*mdb_del)(void *, unsigned int, struct value *, struct value *);
static int (*mdb_cursor_open)(void *, unsigned int, void **);
static int (*mdb_cursor_get)(void *, struct value *, struct value *, int);
static void (*mdb_cursor_close)(void *);
static char *(*mdb_strerror)(int);

static bool mdb(const char *what, int result)
{
	return !result || failed(what, mdb_strerror(result));
}

static void *lmdb(const char *kind, void *library, const char *file)
{
	unsigned int flags = MDB_NOSUBDIR | (strcmp(kind, "lmdb-map") ? 0 : MDB_WRITEMAP);
	void *env;

	mdb_env_create = symbol(library, "mdb_env_create");
	mdb_env_set_mapsize = symbol(library, "mdb_env_set_mapsize");
	mdb_env_open = symbol(library, "mdb_env_open");
	mdb_txn_begin = symbol(library, "mdb_txn_begin");
	mdb_txn_commit = symbol(library, "mdb_txn_commit");
	mdb_dbi_open = symbol(library, "mdb_dbi_open");
	mdb_put = symbol(library, "mdb_put");
	mdb_del = symbol(library, "mdb_del");
	mdb_cursor_open = symbol(library, "mdb_cursor_open");
	mdb_cursor_get = symbol(library, "mdb_cursor_get");
	mdb_cursor_close = symbol(library, "mdb_cursor_close");
	mdb_strerror = symbol(library, "mdb_strerror");
	return mdb("mdb_env_create", mdb_env_create(&env)) &&
			       mdb("mdb_env_set_mapsize", mdb_env_set_mapsize(env, MAP_SIZE)) &&
			       mdb("mdb_env_open", mdb_env_open(env, file, flags, 0644)) ?
		       env :
		       NULL;
}

static bool lmdb_begin(void *env, void **txn, unsigned int *dbi)
{
	return mdb("mdb_txn_begin", mdb_txn_begin(env, NULL, 0, txn)) &&
	       mdb("mdb_dbi_open", mdb_dbi_open(*txn, NULL, 0, dbi));
}

/* Keys are big-endian numbers, so that they are in order; 0 is the key of the last number. */
static struct value key_of(uint64_t row, uint64_t *space)
{
	*space = __builtin_bswap64(row);
	return (struct value){ sizeof(*space), space };
}

static bool lmdb_commit(void *env, uint64_t row)
{
	uint64_t space, old, zero;
	struct value key = key_of(row, &space), gone = key_of(row - KEPT, &old);
	struct value last = key_of(0, &zero), number = { sizeof(row), &row };
	struct value content = { length_of(row), malloc(length_of(row)) };
	unsigned int dbi;
	bool good;
	void *txn;

	if (!content.data)
		return failed("malloc", strerror(errno));
	memset(content.data, letter_of(row), content.size);
	good = lmdb_begin(env, &txn, &dbi) &&
	       (!row || mdb("mdb_put", mdb_put(txn, dbi, &key, &content, 0))) &&
	       (row <= KEPT || mdb("mdb_del", mdb_del(txn, dbi, &gone, NULL))) &&
	       mdb("mdb_put", mdb_put(txn, dbi, &last, &number, 0)) &&
	       mdb("mdb_txn_commit", mdb_txn_commit(txn));
	free(content.data);
	return good;
}

static bool lmdb_check(void *env, uint64_t *last)
{
	uint64_t expected = 0, row;
	struct value key, content;
	unsigned int dbi;
	void *txn, *cursor;
	int result;

	if (!lmdb_begin(env, &txn, &dbi) ||
	    !mdb("mdb_cursor_open", mdb_cursor_open(txn, dbi, &cursor)))
		return false;
	result = mdb_cursor_get(cursor, &key, &content, MDB_FIRST);
	for (; !result; result = mdb_cursor_get(cursor, &key, &content, MDB_NEXT)) {
		if (key.size != sizeof(row))
			return failed("rows", "a key of another size");
		memcpy(&row, key.data, sizeof(row));
		row = __builtin_bswap64(row);
		if (!row) {
			memcpy(last, content.data, sizeof(*last));
			expected = *last > KEPT ? *last - KEPT + 1 : 1;
			continue;
		}
		if (row != expected++ || content.size != length_of(row))
			return failed("rows", "not as committed");
		for (size_t i = 0; i < content.size; i++)
			if (((char *)content.data)[i] != letter_of(row))
				return failed("rows", "other content");
	}
	mdb_cursor_close(cursor);
	if (result != MDB_NOTFOUND)
		return mdb("mdb_cursor_get", result);
	return expected == *last + 1 || failed("rows", "one is missing");
}

static bool is_sqlite(const char *kind)
{
	if (strcmp(kind, "sqlite-wal") && strcmp(kind, "sqlite-delete") && strcmp(kind, "lmdb") &&
	    strcmp(kind, "lmdb-map"))
		usage("unknown kind", kind);
	return !strncmp(kind, "sqlite", 6);
}

static void *open_database(const char *kind, const char *library, const char *file)
{
	void *loaded = dlopen(library, RTLD_NOW);

	return is_sqlite(kind) ? sqlite(kind, loaded, file) : lmdb(kind, loaded, file);
}

static int run(int argc, char **argv)
{
	volatile uint64_t *counter;
	uint64_t count, row;
	bool is_sql, good;
	void *db;
	int fd;

	if (argc != 7)
		usage("expected KIND, LIBRARY, FILE, COUNTER and COUNT", NULL);
	is_sql = is_sqlite(argv[2]);
	count = parse_number("COUNT", argv[6], 0, 100000);
	fd = open(argv[5], O_RDWR | O_CLOEXEC);
	if (fd < 0)
		fail(argv[5]);
	counter = mmap(NULL, COUNTER_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (counter == MAP_FAILED)
		fail("mmap of the counter");
	db = open_database(argv[2], argv[3], argv[4]);
	good = db != NULL;
	if (good && !count)
		good = is_sql ? sqlite_make(db) : lmdb_commit(db, 0);
	for (row = 1; good && row <= count; row++) {
		good = is_sql ? sqlite_commit(db, row) : lmdb_commit(db, row);
		if (good)
			__atomic_store_n(counter, *counter + 1, __ATOMIC_SEQ_CST);
	}
	report_begin();
	report_string("verb", "run");
	report_string("error", error);
	report_end();
	return EXIT_FINE;
}

static int check(int argc, char **argv)
{
	if (argc < 5 || argc % 3 != 2)
		usage("expected KIND, LIBRARY and FILE, once or more", NULL);
	report_begin();
	report_string("verb", "check");
	report_open("databases", '[');
	for (int i = 2; i < argc; i += 3) {
		bool is_sql = is_sqlite(argv[i]);
		uint64_t last = 0;
		void *db;

		error[0] = '\0';
		db = open_database(argv[i], argv[i + 1], argv[i + 2]);
		if (db && (is_sql ? sqlite_check(db, &last) : lmdb_check(db, &last)))
			error[0] = '\0';
		report_open(NULL, '{');
		report_string("kind", argv[i]);
		report_number("last", last);
		report_string("error", error);
		report_close('}');
	}
	report_close(']');
	report_end();
	return EXIT_FINE;
}

int main(int argc, char **argv)
{
	return parse_verb(argc, argv, "run", "check") ? check(argc, argv) : run(argc, argv);
}

// Package pagecache prevents the export of a large disk from evicting everything else from
// the page cache. It drops the pages behind sequential readers, but only those that the
// readers brought in: a file that was cached before stays cached.
package pagecache

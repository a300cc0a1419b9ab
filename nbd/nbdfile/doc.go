// Package nbdfile opens regular files and block devices of Linux as devices of package nbd,
// for reading or for reading and writing. A device implements those of the optional
// interfaces of package nbd that its file supports; one that was opened read-only is no
// nbd.Writer.
package nbdfile

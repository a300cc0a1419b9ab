// Package nbdfile makes regular files and block devices of Linux into devices
// of package nbd, to be read or to be written. What a value can do besides
// reading shows in the interfaces of package nbd that it implements: a file
// that was opened for reading only has no way to be written.
package nbdfile

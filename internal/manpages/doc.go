// Package manpages makes man pages from the definitions of a command line and of
// its settings. Only tests and the man target of the Makefile use it; it is not part of
// the programs.
package manpages

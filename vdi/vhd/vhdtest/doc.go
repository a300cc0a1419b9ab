// Package vhdtest writes VHD images for tests: dynamic and differencing ones, with the
// layout and in the order of writes of XenServer's storage manager and its tools. It is
// written from the description of the format and shares no code with package vhd, so that
// a mistake in one does not hide the same mistake in the other.
package vhdtest

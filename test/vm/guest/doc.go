// Package guest has the tests that run in the guests of test/vm: as root, on a machine that
// is discarded afterwards. Elsewhere it runs none. The other files make devices for the
// simulated host: disks through Xen, and NBD devices of the kernel with a VHD behind them.
package guest

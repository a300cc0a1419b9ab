// Package guest holds the tests that run in the guests of test/vm: as root, on a
// machine that is thrown away afterwards. Elsewhere it has none. What is not a
// test here makes real devices for the simulated host: disks that go through
// Xen, and NBD devices of the kernel with a VHD behind them.
package guest

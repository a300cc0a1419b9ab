//go:build !race

package wire_test

// raceEnabled: the race detector allocates on its own account.
const raceEnabled = false

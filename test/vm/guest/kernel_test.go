package guest

import (
	"fmt"
	"testing"
)

// TestKernel is about NBD devices of a plain kernel: as the devices that the
// service reads, and as clients of our server and of the service.
func TestKernel(t *testing.T) {
	must(t, "modprobe", "nbd", "nbds_max=24") // as many as xapi's helper wants
	t.Run("peers", func(t *testing.T) {
		logPeer(t, "Linux", must(t, "uname", "-r"))
		logPeer(t, "nbd-client", must(t, "dpkg-query", "-W", "-f", "${Version}", "nbd-client"))
		logClientPeers(t, "nbdcopy", "qemu-img", "qemu-nbd")
	})
	for _, sector := range []int{512, 4096} {
		t.Run(fmt.Sprintf("device with sectors of %d", sector), func(t *testing.T) { testDevicePull(t, sector) })
	}
	t.Run("marks of a device", testDeviceMarks)
	for _, ioctl := range []bool{false, true} {
		how := "netlink"
		if ioctl {
			how = "ioctl"
		}
		t.Run("device unplugged by another, "+how, func(t *testing.T) { testDeviceUnplugged(t, ioctl) })
		t.Run("device taken by another, "+how, func(t *testing.T) { testDeviceTaken(t, ioctl) })
	}
	t.Run("device, kill -9", testDeviceKill)
	for _, tt := range []struct {
		name        string
		sector      int
		connections int
	}{
		{"client with sectors of 512", 512, 1},
		{"client with sectors of 4096", 4096, 1},
		{"client with 4 connections", 512, 4},
		{"client with 4 connections and sectors of 4096", 4096, 4},
	} {
		t.Run(tt.name, func(t *testing.T) { testKernelClient(t, tt.sector, tt.connections) })
	}
	for _, connections := range []int{1, 4} {
		t.Run(fmt.Sprintf("client that writes through the service, connections: %d", connections), func(t *testing.T) {
			testKernelClientOfService(t, connections)
		})
	}
}

package vdi

// CheckDevice lets tests try device texts that the simulated host never gives.
var CheckDevice = checkDevice

// Users is how many users the VDI's attachment has.
func (m *Manager) Users(vdiUUID string) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	if a := m.attachments[vdiUUID]; a != nil {
		return a.users
	}
	return 0
}

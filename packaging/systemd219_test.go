package packaging

// keys219 are the keys of units that systemd 219 reads, by section: its table of settings
// without obsolete keys and those of other kinds of units.
var keys219 = map[string]string{
	"unit": `Description Documentation Requires Requisite Wants BindsTo Conflicts Before After
		OnFailure PropagatesReloadTo ReloadPropagatedFrom PartOf JoinsNamespaceOf RequiresMountsFor
		StopWhenUnneeded RefuseManualStart RefuseManualStop AllowIsolate DefaultDependencies
		OnFailureJobMode IgnoreOnIsolate JobTimeoutSec JobTimeoutAction SourcePath
		ConditionPathExists ConditionPathExistsGlob ConditionPathIsDirectory ConditionPathIsSymbolicLink
		ConditionPathIsMountPoint ConditionPathIsReadWrite ConditionDirectoryNotEmpty
		ConditionFileNotEmpty ConditionFileIsExecutable ConditionNeedsUpdate ConditionFirstBoot
		ConditionKernelCommandLine ConditionArchitecture ConditionVirtualization ConditionSecurity
		ConditionCapability ConditionHost ConditionACPower`,
	"install": "WantedBy RequiredBy Alias Also DefaultInstance",
	"path": `PathExists PathExistsGlob PathChanged PathModified DirectoryNotEmpty Unit MakeDirectory
		DirectoryMode`,
	"socket": `ListenStream ListenDatagram ListenSequentialPacket ListenFIFO ListenSpecial
		ListenNetlink ListenMessageQueue BindIPv6Only Backlog BindToDevice SocketUser SocketGroup
		SocketMode DirectoryMode Accept MaxConnections KeepAlive KeepAliveTimeSec
		KeepAliveIntervalSec KeepAliveProbes NoDelay Priority DeferAcceptSec ReceiveBuffer
		SendBuffer IPTOS IPTTL Mark ReusePort FreeBind Transparent Broadcast PassCredentials
		PassSecurity TCPCongestion PipeSize RemoveOnStop Symlinks TimeoutSec Service`,
	"service": `Type ExecStartPre ExecStart ExecStartPost ExecReload ExecStop ExecStopPost RestartSec
		TimeoutSec TimeoutStartSec TimeoutStopSec WatchdogSec StartLimitInterval StartLimitBurst
		StartLimitAction FailureAction RebootArgument Restart PermissionsStartOnly RemainAfterExit
		GuessMainPID PIDFile RestartPreventExitStatus RestartForceExitStatus SuccessExitStatus
		NonBlocking BusName NotifyAccess Sockets FileDescriptorStoreMax
		WorkingDirectory RootDirectory User Group SupplementaryGroups Nice OOMScoreAdjust
		IOSchedulingClass IOSchedulingPriority CPUSchedulingPolicy CPUSchedulingPriority
		CPUAffinity UMask Environment EnvironmentFile StandardInput StandardOutput StandardError
		SyslogIdentifier SyslogFacility SyslogLevel SyslogLevelPrefix SecureBits
		CapabilityBoundingSet TimerSlackNSec NoNewPrivileges SystemCallFilter
		SystemCallArchitectures SystemCallErrorNumber RestrictAddressFamilies
		LimitCPU LimitFSIZE LimitDATA LimitSTACK LimitCORE LimitRSS LimitNOFILE LimitAS LimitNPROC
		LimitMEMLOCK LimitLOCKS LimitSIGPENDING LimitMSGQUEUE LimitNICE LimitRTPRIO LimitRTTIME
		ReadWriteDirectories ReadOnlyDirectories InaccessibleDirectories PrivateTmp PrivateNetwork
		PrivateDevices ProtectSystem ProtectHome MountFlags Personality RuntimeDirectory
		RuntimeDirectoryMode IgnoreSIGPIPE UtmpIdentifier SELinuxContext AppArmorProfile
		Slice CPUAccounting CPUShares StartupCPUShares CPUQuota MemoryAccounting MemoryLimit
		DeviceAllow DevicePolicy BlockIOAccounting BlockIOWeight Delegate
		KillMode SendSIGKILL SendSIGHUP KillSignal`,
}

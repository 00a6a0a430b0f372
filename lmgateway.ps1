#requires -Version 5.1
<#
.SYNOPSIS
Runs lmgateway on Windows as a scheduled task: without a window, from logon or boot on, started again when it fails.

.DESCRIPTION
-Install copies lmgateway.py, which lies beside this script, to %LOCALAPPDATA%\lmgateway and registers the task
"lmgateway" for the user who runs this script: that should be the user who runs LM Studio.  On the first install it makes
a key and keeps it in lmgateway.env there, a file that only this user can read.  Options are lines of that file, such as
GATEWAY_PORT=8001; they count from the next -Start on.  Running -Install again brings a newer lmgateway.py into use and
keeps the key and the options.

It needs Python 3.9 or newer from python.org.  Windows PowerShell 5.1 and PowerShell 7 run it.  Where scripts are
not allowed: powershell -ExecutionPolicy Bypass -File lmgateway.ps1 -Install

.PARAMETER Install
Copy, register and start it.

.PARAMETER At
Logon (the default): it runs while this user is logged on.  Boot: also before; needs an administrator's PowerShell.

.PARAMETER ListenOn
The address to listen on: 127.0.0.1 for this machine alone, 0.0.0.0 for the LAN (then also: -OpenFirewall).

.PARAMETER Port
The port to listen on.

.PARAMETER Uninstall
Stop it and remove the task and the firewall rule.  The key, the options and the log stay.

.PARAMETER Status
Show the task, its last result, and whether the gateway answers.  This is also what happens without any parameter.

.PARAMETER Start
Start it, after -Stop or a change of options.

.PARAMETER Stop
Stop it until -Start, also over a boot.  Running requests are cut.

.PARAMETER OpenFirewall
Let the local network through the firewall to its port; needs an administrator's PowerShell.

.EXAMPLE
.\lmgateway.ps1 -Install
Runs at http://127.0.0.1:8001 from now on, and after each logon.

.EXAMPLE
.\lmgateway.ps1 -Install -At Boot -ListenOn 0.0.0.0; .\lmgateway.ps1 -OpenFirewall
Runs from boot on, for the whole local network.

.EXAMPLE
.\lmgateway.ps1 -Install -WhatIf
Shows what would be done and does nothing.

.LINK
https://learn.microsoft.com/powershell/module/scheduledtasks/register-scheduledtask
#>
[CmdletBinding(SupportsShouldProcess = $true, DefaultParameterSetName = 'Status')]
param(
    [Parameter(Mandatory = $true, ParameterSetName = 'Install')] [switch] $Install,
    [Parameter(ParameterSetName = 'Install')] [ValidateSet('Logon', 'Boot')] [string] $At = 'Logon',
    [Parameter(ParameterSetName = 'Install')] [string] $ListenOn,
    [Parameter(ParameterSetName = 'Install')] [ValidateRange(1, 65535)] [int] $Port,
    [Parameter(Mandatory = $true, ParameterSetName = 'Uninstall')] [switch] $Uninstall,
    [Parameter(ParameterSetName = 'Status')] [switch] $Status,
    [Parameter(Mandatory = $true, ParameterSetName = 'Start')] [switch] $Start,
    [Parameter(Mandatory = $true, ParameterSetName = 'Stop')] [switch] $Stop,
    [Parameter(Mandatory = $true, ParameterSetName = 'OpenFirewall')] [switch] $OpenFirewall
)

Set-StrictMode -Version Latest
$ErrorActionPreference = 'Stop'

$TaskName = 'lmgateway'
$Folder = Join-Path $env:LOCALAPPDATA 'lmgateway'
$Program = Join-Path $Folder 'lmgateway.py'
$OptionsFile = Join-Path $Folder 'lmgateway.env'
$LogFile = Join-Path $Folder 'lmgateway.log'
$Cache = Join-Path $Folder 'cache'


# --- this machine ------------------------------------------------------------

function Assert-Elevated {
    # Throws unless an administrator's PowerShell runs this.
    param([string] $What)
    $identity = [Security.Principal.WindowsIdentity]::GetCurrent()
    $principal = New-Object Security.Principal.WindowsPrincipal($identity)
    if (-not $principal.IsInRole([Security.Principal.WindowsBuiltInRole]::Administrator)) {
        throw "$What needs an administrator: right-click PowerShell, 'Run as administrator', and call this again."
    }
}

function Find-Python {
    # The path of a python.exe of version 3.9 or newer.  Throws with what to install.
    $names = @('py', 'python3', 'python')
    $commands = @(Get-Command -Name $names -CommandType Application -All -ErrorAction SilentlyContinue)
    # What lies in WindowsApps may be the stub that only opens the Store: last, and only if it answers.
    $stubs = @($commands | Where-Object { $_.Source -like '*\Microsoft\WindowsApps\*' })
    $others = @($commands | Where-Object { $_.Source -notlike '*\Microsoft\WindowsApps\*' })
    foreach ($command in $others + $stubs) {
        $found = Test-Python -Path $command.Source
        if ($found) { return $found }
    }
    throw ('No Python 3.9 or newer was found. Install it from https://www.python.org/downloads/windows/ ' +
        '(or: winget install Python.Python.3.13), open a new PowerShell and call this again.')
}

function Test-Python {
    # The real path of the Python that a command starts, or nothing when it is none or too old.
    param([string] $Path)
    $ErrorActionPreference = 'Continue'  # 5.1 makes a terminating error of anything on stderr under 'Stop'
    # ascii(): what Python writes and what PowerShell reads need not be the same code page.
    $arguments = @('-c', 'import sys; print(int(sys.version_info >= (3, 9)), ascii(sys.executable))')
    if ((Split-Path -Leaf $Path) -eq 'py.exe') { $arguments = @('-3') + $arguments }
    try { $answer = @(& $Path @arguments 2>$null) } catch { return $null }
    if ($answer.Count -gt 0 -and "$($answer[-1])" -match '^1 ''(.+)''$') {
        $python = [regex]::Unescape($Matches[1])
        if (Test-Path -LiteralPath $python) { return $python }
    }
    return $null
}

function Get-WindowlessPython {
    # pythonw.exe beside a python.exe: it opens no console window.
    param([string] $Python)
    $windowless = Join-Path (Split-Path -Parent $Python) 'pythonw.exe'
    if (Test-Path -LiteralPath $windowless) { return $windowless }
    Write-Warning "There is no pythonw.exe beside $Python : a console window will show. The Python of python.org has one."
    return $Python
}


# --- options and key ---------------------------------------------------------

function New-Key {
    # A key such as LM Studio's own SDKs accept: sk-lm-, 8 characters, a colon, 20 characters.
    $alphabet = 'ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789'
    $random = [Security.Cryptography.RandomNumberGenerator]::Create()
    $byte = New-Object byte[] 1
    $text = New-Object Text.StringBuilder
    while ($text.Length -lt 28) {
        $random.GetBytes($byte)
        # 248 is four times 62: beyond it some characters would come more often.
        if ($byte[0] -lt 248) { [void] $text.Append($alphabet[$byte[0] % 62]) }
    }
    $random.Dispose()
    return 'sk-lm-' + $text.ToString(0, 8) + ':' + $text.ToString(8, 20)
}

function Protect-File {
    # Only the user who runs this can read and write the file from now on.
    param([string] $Path)
    $user = [Security.Principal.WindowsIdentity]::GetCurrent().User.Value
    [void] (& icacls.exe $Path /inheritance:r /grant:r "*${user}:(F)")
    if ($LASTEXITCODE -ne 0) { throw "The rights of $Path cannot be set (icacls says $LASTEXITCODE)." }
}

function Get-Option {
    # The value of an option in the options file, or the default.
    param([string] $Name, [string] $Default)
    if (Test-Path -LiteralPath $OptionsFile) {
        foreach ($line in @(Get-Content -LiteralPath $OptionsFile)) {
            if ($line -match "^\s*$Name\s*=\s*(.*?)\s*$") { return $Matches[1] }
        }
    }
    return $Default
}

function Set-Option {
    # Put NAME=value into the options file, in the place of an older line of that name.
    param([string] $Name, [string] $Value)
    $lines = @(Get-Content -LiteralPath $OptionsFile | Where-Object { $_ -notmatch "^\s*$Name\s*=" })
    [IO.File]::WriteAllLines($OptionsFile, [string[]] ($lines + "$Name=$Value"))
}

function Initialize-Options {
    # The options file: made on the first install, readable by this user alone, with a key in it.
    param([hashtable] $Given)
    if (-not (Test-Path -LiteralPath $OptionsFile)) {
        [void] (New-Item -ItemType File -Path $OptionsFile)
    }
    Protect-File -Path $OptionsFile  # before the key goes in
    if (-not (Get-Option -Name 'GATEWAY_API_KEY' -Default '')) { Set-Option -Name 'GATEWAY_API_KEY' -Value (New-Key) }
    if (-not (Get-Option -Name 'LOG_FILE' -Default '')) { Set-Option -Name 'LOG_FILE' -Value $LogFile }
    foreach ($name in $Given.Keys) { Set-Option -Name $name -Value $Given[$name] }
}


# --- the task ----------------------------------------------------------------

function Get-Task {
    return Get-ScheduledTask -TaskName $TaskName -ErrorAction SilentlyContinue
}

function Assert-Installed {
    if (-not (Get-Task)) { throw "lmgateway is not installed: .\lmgateway.ps1 -Install" }
}

function Register-Task {
    # Register the task, in the place of an older one.  As a module (-m) Python keeps its compiled code in $Cache: half
    # the time to start, half the memory.
    param([string] $Python, [string] $When)
    $user = [Security.Principal.WindowsIdentity]::GetCurrent().Name
    $action = New-ScheduledTaskAction -Execute (Get-WindowlessPython -Python $Python) -WorkingDirectory $Folder `
        -Argument "-X pycache_prefix=`"$Cache`" -m lmgateway --env-file `"$OptionsFile`""
    if ($When -eq 'Boot') {
        $first = New-ScheduledTaskTrigger -AtStartup
        # S4U: runs without a logon and without a stored password, with this user's files.
        $principal = New-ScheduledTaskPrincipal -UserId $user -LogonType S4U -RunLevel Limited
    }
    else {
        $first = New-ScheduledTaskTrigger -AtLogOn -User $user
        $principal = New-ScheduledTaskPrincipal -UserId $user -LogonType Interactive -RunLevel Limited
    }
    # RestartCount covers a task that cannot be started.  One that ends with an error does not always count as failed:
    # so it is also started every five minutes, which does nothing while it runs (MultipleInstances IgnoreNew).
    $again = New-ScheduledTaskTrigger -Once -At (Get-Date) -RepetitionInterval (New-TimeSpan -Minutes 5)
    # ExecutionTimeLimit 0: no limit, else Windows ends it after three days.  Priority 5: normal, else a task's
    # is below normal, and every request would wait.
    $settings = New-ScheduledTaskSettingsSet -ExecutionTimeLimit ([TimeSpan]::Zero) -RestartCount 255 `
        -RestartInterval (New-TimeSpan -Minutes 1) -MultipleInstances IgnoreNew -StartWhenAvailable `
        -AllowStartIfOnBatteries -DontStopIfGoingOnBatteries -DontStopOnIdleEnd -Priority 5
    try {
        [void] (Register-ScheduledTask -TaskName $TaskName -Action $action -Trigger @($first, $again) `
            -Principal $principal -Settings $settings -Description 'Gateway, log monitor and dashboard for LM Studio' -Force)
    }
    catch { throw "Windows does not register the task ($($_.Exception.Message)): try it as an administrator." }
}

function Install-Gateway {
    [CmdletBinding(SupportsShouldProcess = $true)]
    param([string] $When, [hashtable] $Given)
    if ($When -eq 'Boot' -and -not $WhatIfPreference) { Assert-Elevated -What 'A task that starts at boot' }
    $python = Find-Python
    $source = Join-Path $PSScriptRoot 'lmgateway.py'
    if (-not (Test-Path -LiteralPath $source)) { throw "There is no lmgateway.py in $PSScriptRoot, beside this script: put it there." }
    if ($PSCmdlet.ShouldProcess($Folder, "copy lmgateway.py and keep a key and options in $OptionsFile")) {
        [void] (New-Item -ItemType Directory -Path $Folder -Force)
        if ($source -ne $Program) { Copy-Item -LiteralPath $source -Destination $Program -Force }
        Initialize-Options -Given $Given
    }
    if ($PSCmdlet.ShouldProcess($TaskName, "register the scheduled task (at $When, with $python) and start it")) {
        if (Get-Task) { Stop-ScheduledTask -TaskName $TaskName }
        Register-Task -Python $python -When $When
        Start-ScheduledTask -TaskName $TaskName
        Write-Output "Installed. The key for clients: the line GATEWAY_API_KEY in $OptionsFile"
        Show-Status
    }
}

function Uninstall-Gateway {
    [CmdletBinding(SupportsShouldProcess = $true)]
    param()
    if ((Get-Task) -and $PSCmdlet.ShouldProcess($TaskName, 'stop and remove the scheduled task')) {
        Stop-ScheduledTask -TaskName $TaskName
        Unregister-ScheduledTask -TaskName $TaskName -Confirm:$false
    }
    $rule = Get-NetFirewallRule -Name $TaskName -ErrorAction SilentlyContinue
    if ($rule -and $PSCmdlet.ShouldProcess($TaskName, 'remove the firewall rule')) {
        Assert-Elevated -What 'The task is gone. Removing the firewall rule'
        Remove-NetFirewallRule -Name $TaskName
    }
    Write-Output "lmgateway does not run. Its key, options and log are still in $Folder"
}

function Start-Gateway {
    [CmdletBinding(SupportsShouldProcess = $true)]
    param()
    Assert-Installed
    if ($PSCmdlet.ShouldProcess($TaskName, 'start')) {
        Stop-ScheduledTask -TaskName $TaskName  # one that runs has old options
        [void] (Enable-ScheduledTask -TaskName $TaskName)
        Start-ScheduledTask -TaskName $TaskName
        Show-Status
    }
}

function Stop-Gateway {
    [CmdletBinding(SupportsShouldProcess = $true)]
    param()
    Assert-Installed
    if ($PSCmdlet.ShouldProcess($TaskName, 'stop, until -Start')) {
        [void] (Disable-ScheduledTask -TaskName $TaskName)  # first: else a trigger could start it again
        Stop-ScheduledTask -TaskName $TaskName
        Write-Output 'Stopped. .\lmgateway.ps1 -Start starts it again.'
    }
}

function Show-Status {
    # What the task says, and whether the gateway answers within a few seconds.
    $task = Get-Task
    if (-not $task) {
        Write-Output 'lmgateway is not installed: .\lmgateway.ps1 -Install'
        return
    }
    $info = Get-ScheduledTaskInfo -TaskName $TaskName
    Write-Output ('Task:     {0}, last start {1}, last result 0x{2:X}' -f $task.State, $info.LastRunTime, $info.LastTaskResult)
    $url = 'http://127.0.0.1:{0}' -f (Get-Option -Name 'GATEWAY_PORT' -Default '8001')
    $answer = $null
    for ($round = 0; $round -lt 6 -and $task.State -ne 'Disabled' -and -not $answer; $round++) {
        try { $answer = Invoke-RestMethod -Uri "$url/health" -TimeoutSec 2 }
        catch { Start-Sleep -Milliseconds 500 }
    }
    if ($answer -and $answer.PSObject.Properties['version']) {
        Write-Output "Gateway:  lmgateway $($answer.version) answers at $url, dashboard $url/"
    }
    else {
        Write-Output "Gateway:  no answer at $url/health; see the log, or have it checked:"
        Write-Output "          py `"$Program`" --check --env-file `"$OptionsFile`""
    }
    Write-Output "Options:  $OptionsFile"
    Write-Output "Log:      $(Get-Option -Name 'LOG_FILE' -Default $LogFile)"
}

function Open-Firewall {
    [CmdletBinding(SupportsShouldProcess = $true)]
    param()
    $number = Get-Option -Name 'GATEWAY_PORT' -Default '8001'
    if ($PSCmdlet.ShouldProcess("TCP port $number", 'let the local network in')) {
        Assert-Elevated -What 'A firewall rule'
        Remove-NetFirewallRule -Name $TaskName -ErrorAction SilentlyContinue
        # Not in public networks, and from nowhere but the local subnet.
        $profiles = @('Private', 'Domain')
        [void] (New-NetFirewallRule -Name $TaskName -DisplayName 'lmgateway' -Direction Inbound -Action Allow -Protocol TCP `
            -LocalPort $number -Profile $profiles -RemoteAddress LocalSubnet)
        Write-Output "The local network can reach port $number."
        if ((Get-Option -Name 'GATEWAY_HOST' -Default '127.0.0.1') -eq '127.0.0.1') {
            Write-Output 'lmgateway still listens on this machine alone: .\lmgateway.ps1 -Install -ListenOn 0.0.0.0'
        }
    }
}


# --- dispatch: last, so that a file that was cut short does nothing ------------

$given = @{}
if ($PSBoundParameters.ContainsKey('ListenOn')) { $given['GATEWAY_HOST'] = $ListenOn }
if ($PSBoundParameters.ContainsKey('Port')) { $given['GATEWAY_PORT'] = "$Port" }
switch ($PSCmdlet.ParameterSetName) {
    'Install' { Install-Gateway -When $At -Given $given }
    'Uninstall' { Uninstall-Gateway }
    'Start' { Start-Gateway }
    'Stop' { Stop-Gateway }
    'OpenFirewall' { Open-Firewall }
    default { Show-Status }
}
